"""A model written as a Hugging Face folder, which transformers and everything after it reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.checkpoints.folder import new_folder
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.names import parameters
from qlora_jax.checkpoints.tensors import INDEX, SINGLE, fault_of
from qlora_jax.errors import QloraError, missing
from qlora_jax.lora.adapters import named_leaves
from qlora_jax.lora.array import is_weight

SHARD_BYTES = 2 * 1024**3
"""Tensors of a shard are held in memory until it is written."""


def save_pretrained(
    folder: str | Path, model: Model, params: Any = None, *, dtype: DTypeLike = jnp.bfloat16
) -> None:
    """config.json, safetensors and tokenizer of `model`, all weights dense and of `dtype`.

    params: the tree to write, `model.params` by default; adapters attached by `lora.attach` are
    merged on the way, W + scaling * A B summed in fp32 and rounded once, layer by layer. Raises
    QloraError if `folder` is there and not empty, and for weights that are not finite or that
    `dtype` cannot hold; then nothing is left behind.
    """
    try:
        from safetensors.numpy import save_file
    except ModuleNotFoundError as error:
        raise missing("safetensors", f"writing {folder}", "hf") from error
    leaves = named_leaves(model.params if params is None else params)
    with new_folder(Path(folder)) as part:
        shards: list[dict[str, int]] = []
        for tensors in _shards(_tensors(model, leaves, dtype)):
            name = f"{len(shards)}.part"
            save_file(tensors, part / name, metadata={"format": "pt"})
            shards.append({key: x.nbytes for key, x in tensors.items()})
        _name_shards(part, shards)
        save_config(part, model, dtype)
        save_tokenizer(part, model)


def save_config(folder: Path, model: Model, dtype: DTypeLike) -> None:
    """config.json, with the type of the weights that go with it."""
    config = model.config.to_hf() | {"torch_dtype": np.dtype(dtype).name}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_tokenizer(folder: Path, model: Model) -> None:
    """The tokenizer's files, if the model has one."""
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def _tensors(
    model: Model, leaves: dict[str, Any], dtype: DTypeLike
) -> Iterator[tuple[str, np.ndarray]]:
    for parameter in parameters(model.config):
        leaf = leaves[parameter.path]
        for layer in range(parameter.layers):
            at = parameter.at(layer)
            one = jax.tree.map(lambda x, at=at: x[at], leaf)
            dense = one.dequantize(dtype) if is_weight(one) else one.astype(dtype)
            name = parameter.hf_name(layer)
            if fault := fault_of(dense):
                raise QloraError(
                    f"{name}: {fault}; nothing was written. Check the adapters, or choose a dtype "
                    "of wider range"
                )
            yield name, np.ascontiguousarray(parameter.to_file(np.asarray(dense)))


def _shards(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, x in tensors:
        if shard and sum(y.nbytes for y in shard.values()) + x.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = x
    yield shard


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Their final names, which hold the number of shards, and the index if there are several."""
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / name)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(size for shard in shards for size in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
