"""A model written as a Hugging Face folder, which transformers and everything after it reads."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.checkpoints.folder import new_folder
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.names import OnTensor, Parameter, count_tensors, parameters
from qlora_jax.checkpoints.shards import write_shards
from qlora_jax.checkpoints.tensors import fault_of
from qlora_jax.errors import QloraError
from qlora_jax.lora.array import is_weight, map_stacked
from qlora_jax.lora.tree import named_leaves


def save_pretrained(
    folder: str | Path,
    model: Model,
    params: Any = None,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    on_tensor: OnTensor | None = None,
) -> None:
    """config.json, safetensors and tokenizer of `model`, all weights dense and of `dtype`.

    params: the tree to write, `model.params` by default; adapters attached by `lora.attach` are
    merged on the way, W + scaling * A B summed in fp32 and rounded once, layer by layer. on_tensor:
    called for every tensor that was written. Raises QloraError if `folder` is there and not empty,
    and for weights that are not finite or that `dtype` cannot hold; then nothing is left behind.
    """

    def stored(tensor: tuple[Parameter, int, Any]) -> tuple[str, np.ndarray]:
        parameter, layer, x = tensor
        return parameter.hf_name(layer), dense(parameter, layer, x, dtype)

    with new_folder(Path(folder).expanduser()) as part:
        # map, as a loop over the tensors would hold on to one while the next is read.
        write_shards(part, map(stored, layers_of(model, params, on_tensor)))
        save_config(part, model, dtype)
        save_tokenizer(part, model)


def layers_of(
    model: Model, params: Any = None, on_tensor: OnTensor | None = None
) -> Iterator[tuple[Parameter, int, Any]]:
    """Every tensor that a file has of `params` (`model.params` by default), one after the other.

    Each as (parameter, layer, the layer's slice of the leaf): a dense array, or a weight in 4 bits
    or with an adapter.
    """
    leaves = named_leaves(model.params if params is None else params)
    total = count_tensors(model.config)
    for parameter in parameters(model.config):
        leaf = leaves[parameter.path]
        for layer in range(parameter.layers):
            at = parameter.at(layer)
            # Without a stack the leaf is the layer; indexing would copy it, if it is not on disk.
            whole = not parameter.stacked and isinstance(leaf, jax.Array)
            yield parameter, layer, leaf if whole else map_stacked(lambda x, at=at: x[at], leaf)
            if on_tensor is not None:
                on_tensor(total)


def dense(parameter: Parameter, layer: int, x: Any, dtype: DTypeLike) -> np.ndarray:
    """What `layers_of` gave as files hold it, of `dtype`; QloraError if that is not finite."""
    with np.errstate(over="ignore"):  # said below, with the name
        values = x.dequantize(dtype) if is_weight(x) else _cast(x, dtype)
    if fault := fault_of(values):
        raise QloraError(
            f"{parameter.hf_name(layer)}: {fault}; nothing was written. Check the adapters, or "
            "choose a dtype of wider range"
        )
    return np.ascontiguousarray(parameter.to_file(np.asarray(values)))


def _cast(x: Any, dtype: DTypeLike) -> Any:
    return x if x.dtype == jnp.dtype(dtype) else x.astype(dtype)


def save_config(
    folder: Path, model: Model, dtype: DTypeLike, more: Mapping[str, Any] | None = None
) -> None:
    """config.json, with the type of the weights that go with it, and with `more` entries."""
    config = model.config.to_hf() | {"torch_dtype": np.dtype(dtype).name, **(more or {})}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_tokenizer(folder: Path, model: Model) -> None:
    """The tokenizer's files, if the model has one."""
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
