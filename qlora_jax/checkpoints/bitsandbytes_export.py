"""A model written as a 4-bit folder, as transformers and bitsandbytes write it themselves."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.checkpoints.bitsandbytes import METHOD
from qlora_jax.checkpoints.export import dense, layers_of, save_config, save_tokenizer
from qlora_jax.checkpoints.folder import new_folder
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.names import OnTensor, Parameter, parameters
from qlora_jax.checkpoints.on_disk import OnDisk
from qlora_jax.checkpoints.quant_state import QuantState
from qlora_jax.checkpoints.shards import write_shards
from qlora_jax.errors import QloraError
from qlora_jax.lora import AdaptedArray
from qlora_jax.lora.tree import named_leaves
from qlora_jax.quant import QuantConfig, QuantizedArray, bnb

logger = logging.getLogger("qlora_jax.export")
Storage = Literal["uint8", "float16", "bfloat16", "float32"]


def save_bitsandbytes(
    folder: str | Path,
    model: Model,
    params: Any = None,
    *,
    dtype: DTypeLike | None = None,
    storage: Storage = "uint8",
    on_tensor: OnTensor | None = None,
) -> None:
    """config.json, safetensors and tokenizer of `model`, its 4-bit weights as they are.

    params: the tree to write, `model.params` by default; what is on disk (`load_lazily`) is read
    tensor by tensor, and needs `dtype`. dtype: of the weights that are dense, by
    default what the 4-bit ones were made from. storage: the type that the packed bytes are viewed
    as (bnb_4bit_quant_storage). Weights that bitsandbytes has no 4-bit form for (K no multiple of
    the block, embeddings) are written dense, their modules listed as skipped, and a warning is
    logged. Raises QloraError if `folder` is there and not empty, if there is not exactly one 4-bit
    format in the tree, for attached adapters, for 4-bit experts, and for dense weights that are not
    finite in `dtype`.
    """
    if storage not in get_args(Storage):
        raise QloraError(f"storage is {storage!r}; expected one of {', '.join(get_args(Storage))}")
    leaves = named_leaves(model.params if params is None else params)
    leaves = {path: x.abstract() if isinstance(x, OnDisk) else x for path, x in leaves.items()}
    if lora := [path for path, x in leaves.items() if isinstance(x, AdaptedArray)]:
        raise QloraError(
            f"{folder}: {lora[0]} has an adapter, which merging into 4 bits would round away; save "
            "it with peft.save, or the merged model with save_pretrained or save_gguf"
        )
    for parameter in parameters(model.config):
        if len(parameter.stack) > 1 and isinstance(leaves[parameter.path], QuantizedArray):
            raise QloraError(
                f"{folder}: {parameter.path} is in 4 bits, which transformers 5 cannot read of "
                "experts; write the model with save_quantized, or dense with save_pretrained"
            )
    quantized = [x for x in leaves.values() if isinstance(x, QuantizedArray)]
    formats = {QuantConfig(x.codebook, x.block_size, x.double_quant) for x in quantized}
    if len(formats) != 1:
        raise QloraError(f"{folder}: the model has {len(formats)} 4-bit formats in it, not one")
    dtypes = {jnp.dtype(x.dtype) for x in quantized} if dtype is None else {jnp.dtype(dtype)}
    if len(dtypes) != 1:
        raise QloraError(f"{folder}: 4-bit weights of {dtypes}; say which dtype the dense ones get")
    (kept,), (form,) = dtypes, formats
    if not any(_fits(p, leaves[p.path]) for p in parameters(model.config)):
        raise QloraError(
            f"{folder}: no weight has a 4-bit form in bitsandbytes: inputs must be a multiple of "
            "the block, and the weight a linear layer's; quantize in smaller blocks"
        )
    with new_folder(Path(folder).expanduser()) as part:
        write_shards(part, _tensors(model, params, kept, storage, on_tensor))
        about = _quantization_config(form, kept, storage, _skipped(model, leaves))
        save_config(part, model, kept, {"quantization_config": about})
        save_tokenizer(part, model)


def _tensors(
    model: Model, params: Any, dtype: DTypeLike, storage: Storage, on_tensor: OnTensor | None
) -> Iterator[tuple[str, np.ndarray]]:
    def stored(tensor: tuple[Parameter, int, Any]) -> list[tuple[str, np.ndarray]]:
        parameter, layer, x = tensor
        name = parameter.hf_name(layer)
        if not _fits(parameter, x):
            return [(name, dense(parameter, layer, x, dtype))]
        parts = bnb.to_bitsandbytes(x)
        offset = parts.pop("nested_offset", None)
        state = QuantState(
            format=QuantConfig(x.codebook, x.block_size, x.double_quant),
            shape=(x.shape[1], x.shape[0]),
            dtype=jnp.dtype(x.dtype).name,
            offset=None if offset is None else float(offset),
        )
        packed = parts.pop("packed").reshape(-1).view(jnp.dtype(storage))[:, None]
        beside = {**parts, **state.tables(), state.key: state.to_bytes()}
        named = ((f"{name}.{suffix}", np.ascontiguousarray(x)) for suffix, x in beside.items())
        return [(name, packed), *named]

    # map, as a loop over the tensors would hold on to one while the next is read.
    for tensors in map(stored, layers_of(model, params, on_tensor)):
        while tensors:
            yield tensors.pop(0)


def _fits(parameter: Parameter, x: Any) -> bool:
    """Whether a leaf, or a layer of it, has a form in bitsandbytes' linear layers."""
    if not (isinstance(x, QuantizedArray) and parameter.kernel):
        return False
    return x.k_shape[0] % x.block_size == 0


def _skipped(model: Model, leaves: Mapping[str, Any]) -> list[str] | None:
    """llm_int8_skip_modules: all linear modules that are dense, None if that is the head alone."""
    skipped: list[str] = []
    for parameter in parameters(model.config):
        leaf = leaves[parameter.path]
        if _fits(parameter, leaf):
            continue
        if isinstance(leaf, QuantizedArray):
            logger.warning("%s: written dense, having no 4-bit form there", parameter.hf_module)
        if parameter.kernel:
            skipped += [parameter.module(layer) for layer in range(parameter.layers)]
    if model.config.tie_word_embeddings:
        skipped.append("lm_head")
    return None if skipped == ["lm_head"] else skipped


def _quantization_config(
    form: QuantConfig, dtype: jnp.dtype, storage: Storage, skipped: list[str] | None
) -> dict[str, Any]:
    """What transformers' BitsAndBytesConfig writes."""
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": form.codebook,
        "bnb_4bit_use_double_quant": form.double_quant,
        "bnb_4bit_compute_dtype": dtype.name,
        "bnb_4bit_quant_storage": storage,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
