"""A model of the Llama family as one GGUF file, for llama.cpp and what is built on it."""

import math
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.export import dense, layers_of
from qlora_jax.checkpoints.folder import new_file
from qlora_jax.checkpoints.gguf import ROPE_FACTORS, rows_for_gguf
from qlora_jax.checkpoints.gguf_metadata import (
    ARCHITECTURES,
    add_config,
    describable,
    rope_divisors,
)
from qlora_jax.checkpoints.gguf_tokenizer import add_tokenizer
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.names import OnTensor, Parameter, parameters
from qlora_jax.errors import QloraError, missing
from qlora_jax.lora.array import is_weight

Kind = Literal["f32", "f16", "bf16", "q8_0"]
CHUNK = 1 << 22
"""Numbers that are in fp32 at a time while a tensor is rounded."""

# What numbers are rounded to; the gguf package takes those of Q8_0 from fp32 to 8 bits.
_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16, "Q8_0": jnp.float32}


def save_gguf(
    path: str | Path,
    model: Model,
    params: Any = None,
    *,
    kind: Kind = "f16",
    on_tensor: OnTensor | None = None,
) -> None:
    """The GGUF file of `model`: its configuration, its tokenizer, and its weights, none in 4 bits.

    params: the tree to write, `model.params` by default; adapters attached by `lora.attach` are
    merged on the way, W + scaling * A B summed in fp32 and rounded once. kind: how matrices are
    stored ("q8_0": 8 bits in blocks of 32; F16 where rows are no multiple of that); vectors are
    F32. One tensor at a time is in memory, and a file that is there is replaced when all is
    written. Raises QloraError for a model or a tokenizer that GGUF cannot describe, and for weights
    that are not finite in `kind`.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise missing("gguf", f"writing {path}", "hf") from error
    if kind not in get_args(Kind):
        raise QloraError(f"kind is {kind!r}; expected one of {', '.join(get_args(Kind))}")
    config = describable(model.config)
    divisors = rope_divisors(config)
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as part:
        writer = gguf.GGUFWriter(part, ARCHITECTURES[config.model_type])
        try:
            writer.add_file_type(_file_type(gguf, kind))
            if kind == "q8_0":
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            add_config(writer, config)
            add_tokenizer(writer, model.tokenizer, config)
            if divisors is not None:
                writer.add_tensor_info(
                    ROPE_FACTORS, divisors.shape, divisors.dtype, divisors.nbytes
                )
            for parameter in parameters(config):
                stored = gguf.GGMLQuantizationType[_stored_as(parameter, kind)]
                per_block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
                shape = parameter.file_shape
                nbytes = math.prod(shape) // per_block * block_bytes
                for layer in range(parameter.layers):
                    name = parameter.gguf_name(layer)
                    writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if divisors is not None:
                writer.write_tensor_data(divisors)

            def packed(tensor: tuple[Parameter, int, Any]) -> np.ndarray:
                parameter, layer, x = tensor
                stored = _stored_as(parameter, kind)
                # What is only to be rounded to 8 bits stays as small as it is until then.
                own = stored == "Q8_0" and not is_weight(x)
                dtype = x.dtype if own else _DTYPES[stored]
                values = rows_for_gguf(dense(parameter, layer, x, dtype), config, parameter)
                return _packed(gguf, values, stored)

            # map, as a loop over the tensors would hold on to one while the next is read.
            for values in map(packed, layers_of(model, params, on_tensor)):
                writer.write_tensor_data(values)
                del values
        finally:
            writer.close()


def _stored_as(parameter: Parameter, kind: Kind) -> str:
    """GGUF's type of a parameter."""
    if len(parameter.file_shape) == 1:
        return "F32"
    if kind == "q8_0" and parameter.file_shape[-1] % 32:
        return "F16"
    return kind.upper()


def _packed(gguf: Any, values: np.ndarray, stored: str) -> np.ndarray:
    """`values` as GGUF stores them, made of some rows at a time, since that goes by way of fp32."""
    if stored in ("F32", "F16"):
        return values
    kind = gguf.GGMLQuantizationType[stored]
    rows = max(1, CHUNK * len(values) // values.size)
    whole: Any = None
    for at in range(0, len(values), rows):
        piece = gguf.quants.quantize(values[at : at + rows].astype(np.float32), kind)
        if whole is None:
            whole = np.empty((len(values), *piece.shape[1:]), piece.dtype)
        whole[at : at + rows] = piece
    return whole


def _file_type(gguf: Any, kind: Kind) -> int:
    """What the matrices are, for the record."""
    all_or_most = "ALL" if kind == "f32" else "MOSTLY"
    return gguf.LlamaFileType[f"{all_or_most}_{kind.upper()}"]
