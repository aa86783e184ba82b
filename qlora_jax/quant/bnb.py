"""Our arrays to and from the order in which bitsandbytes stores a weight [out, in]."""

import math
from typing import Any

import numpy as np

from qlora_jax.errors import QloraError
from qlora_jax.quant import codebooks
from qlora_jax.quant.array import QuantizedArray
from qlora_jax.quant.blockwise import NESTED_BLOCK
from qlora_jax.quant.config import CodebookName, levels


def to_bitsandbytes(w: QuantizedArray) -> dict[str, np.ndarray]:
    """One weight [K, N] as bitsandbytes holds its transpose [N, K].

    Returns packed uint8 [N*K/2, 1] (element 2i in the high nibble), absmax (fp32 [N*K/block] or,
    double-quantized, uint8 with nested_absmax fp32 and nested_offset fp32 scalar).
    Raises QloraError for stacked weights or when K is no multiple of the block: bitsandbytes'
    blocks would run over the ends of columns, ours do not.
    """
    k = math.prod(w.k_shape)
    if w.batch_shape or k % w.block_size:
        raise QloraError(f"{w} has no bitsandbytes form: one weight with K a multiple of the block")
    half = w.block_size // 2
    blocks = np.asarray(w.codes).reshape(-1, half, w.codes.shape[-1])
    codes = np.concatenate([blocks & 15, blocks >> 4], axis=1).reshape(k, -1).T.reshape(-1)
    result = {
        "packed": (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "absmax": np.ascontiguousarray(np.asarray(w.scales).T).reshape(-1),
    }
    if w.double_quant:
        result |= {"nested_absmax": np.asarray(w.nested), "nested_offset": np.asarray(w.offset)}
    return result


def from_bitsandbytes(
    tensors: dict[str, np.ndarray],
    shape: tuple[int, int],
    codebook: CodebookName,
    block_size: int,
    dtype: Any,
) -> QuantizedArray:
    """The inverse: tensors as above of a PyTorch weight of `shape` [N, K], bit for bit."""
    n, k = shape
    if k % block_size:
        raise QloraError(
            f"K = {k} is no multiple of the block {block_size}: requantize this weight"
        )
    flat = tensors["packed"].reshape(-1)
    if flat.size * 2 != n * k or tensors["absmax"].size * block_size != n * k:
        raise _does_not_fit(flat.size, tensors["absmax"].size, shape, block_size)
    codes = np.stack([flat >> 4, flat & 15], axis=-1).reshape(n, k).T
    halves = codes.reshape(k // block_size, 2, block_size // 2, n)
    packed = (halves[:, 0] | halves[:, 1] << 4).reshape(k // 2, n)
    return QuantizedArray(
        codes=np.ascontiguousarray(packed),
        scales=np.ascontiguousarray(tensors["absmax"].reshape(n, -1).T),
        nested=tensors.get("nested_absmax"),
        offset=tensors.get("nested_offset"),
        k_shape=(k,),
        n_shape=(n,),
        dtype=np.dtype(dtype),
        codebook=codebook,
        block_size=block_size,
    )


def dense_from_bitsandbytes(
    tensors: dict[str, np.ndarray],
    shape: tuple[int, int],
    codebook: CodebookName,
    block_size: int,
    dtype: Any,
) -> np.ndarray:
    """The numbers that such tensors stand for, [N, K] of `dtype`, by bitsandbytes' roundings.

    For what our arrays cannot hold: where K is no multiple of the block, blocks run from one row of
    the PyTorch weight on into the next.
    """
    n, k = shape
    flat = tensors["packed"].reshape(-1)
    blocks = -(-n * k // block_size)
    if flat.size != -(-n * k // 2) or tensors["absmax"].size != blocks:
        raise _does_not_fit(flat.size, tensors["absmax"].size, shape, block_size)
    codes = np.stack([flat >> 4, flat & 15], axis=-1).reshape(-1)[: n * k]
    absmax = tensors["absmax"]
    if "nested_absmax" in tensors:
        nested = np.repeat(tensors["nested_absmax"], NESTED_BLOCK)[:blocks]
        absmax = codebooks.dynamic_8bit()[absmax] * nested + tensors["nested_offset"]
    spread = np.repeat(absmax, block_size)[: n * k]
    return (levels(codebook)[codes] * spread).astype(dtype).reshape(n, k)


def _does_not_fit(packed: int, scales: int, shape: tuple[int, int], block_size: int) -> QloraError:
    return QloraError(
        f"{packed} packed bytes and {scales} scales of {block_size} do not make a weight of "
        f"shape {shape}"
    )
