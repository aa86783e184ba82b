"""Rounding blocks of numbers to a code book by the rules of bitsandbytes, in plain JAX."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference
from qlora_jax.quant import codebooks

NESTED_BLOCK = 256
"""How many absmax values share one nested absmax under double quantization."""

LARGEST = 2.0**126
"""The largest magnitude whose reciprocal is a normal fp32 number."""


def quantize(x: jax.Array, codebook: np.ndarray, block_size: int) -> tuple[jax.Array, jax.Array]:
    """Round x [..., K, N] in blocks along K to the levels of codebook [16] -> (codes, absmax).

    codes: uint8 [..., Kp/2, N], packed as pallas_kernels.reference says; absmax: fp32
    [..., Kp/block_size, N], with Kp K rounded up to the block size; padding holds the code of zero
    and takes no part in absmax. x is multiplied by fp32 1/absmax and rounded to the nearest level.
    |x| must not exceed `LARGEST`, beyond which 1/absmax is a denormal that XLA flushes to zero.
    """
    *lead, k, n = x.shape
    padding = -k % block_size
    if padding:
        x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, padding), (0, 0)])
    blocks = x.reshape(*lead, (k + padding) // block_size, block_size, n)
    absmax = jnp.max(jnp.abs(blocks), axis=-2).astype(jnp.float32)
    # A block of zeros takes the exact zero code: under double quantization its absmax comes back
    # as a small non-zero number, and only code 7 (NF4) or 0 (FP4) survives that as zero.
    inverse = jnp.where(absmax > 0, 1.0 / absmax, 0.0)
    # Of a 16-bit x, absmax and codes must not share one fp32 copy: XLA would keep it in memory,
    # twice the size of x, where two conversions on the fly cost nothing.
    blocks = jax.lax.optimization_barrier(blocks)
    codes = _nearest(blocks.astype(jnp.float32) * inverse[..., :, None, :], codebook)
    return reference.pack(codes.reshape(*lead, k + padding, n), block_size), absmax


def _nearest(x: jax.Array, table: np.ndarray) -> jax.Array:
    """The code of the level nearest to each x, uint8; a tie goes to the lower level.

    FP4 has two zeros, code 0 and code 8 for -0; sorted, they are two levels with a threshold of 0
    between them. So tiny negative numbers and zero take code 0 and tiny positive ones code 8, as
    bitsandbytes' CPU build has it. (Its CUDA build gives the zero the sign of x and rounds FP4
    ties towards zero; apart from exact ties, the numbers that the codes stand for are the same.)
    """
    order = np.argsort(table, stable=True)
    rank = jnp.zeros(x.shape, jnp.uint8)
    for threshold in codebooks.midpoints(table[order]):
        rank += (x > threshold).astype(jnp.uint8)
    if (order == np.arange(order.size)).all():
        return rank
    return jnp.asarray(order.astype(np.uint8)).at[rank].get(mode="promise_in_bounds")


def look_up(table: jax.Array, codes: jax.Array) -> jax.Array:
    """table[codes], every code being below its length."""
    return table.at[codes].get(mode="promise_in_bounds")


LookUp = Callable[[jax.Array, jax.Array], jax.Array]


class Part(NamedTuple):
    """Where a part of a matrix of scales begins (row, column), and the shape of the whole."""

    first: Sequence[Any]
    whole: tuple[int, int]


def quantize_scales(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Double quantization of absmax [..., K/b, N] -> (codes uint8 of that shape, nested, offset).

    nested: fp32 [..., ceil(K/b * N / 256)], one absmax for 256 scales; offset: fp32 [...], mean.
    The scales are grouped as in bitsandbytes' [out, in] weight: column after column of ours.
    """
    *lead, rows, n = absmax.shape
    flat = jnp.swapaxes(absmax, -1, -2).reshape(*lead, n * rows)
    offset = jnp.mean(flat, axis=-1)
    centred = flat - offset[..., None]
    padding = -(n * rows) % NESTED_BLOCK
    centred = jnp.pad(centred, [(0, 0)] * len(lead) + [(0, padding)])
    blocks = centred.reshape(*lead, -1, NESTED_BLOCK)
    nested = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks * jnp.where(nested > 0, 1.0 / nested, 0.0)[..., None]
    thresholds = jnp.asarray(codebooks.midpoints(codebooks.dynamic_8bit()))
    codes = jnp.searchsorted(thresholds, scaled, side="left").astype(jnp.uint8)
    codes = codes.reshape(*lead, -1)[..., : n * rows].reshape(*lead, n, rows)
    return jnp.swapaxes(codes, -1, -2), nested, offset


def dequantize_scales(
    codes: jax.Array,
    nested: jax.Array,
    offset: jax.Array,
    levels: jax.Array,
    *,
    part: Part | None = None,
    look_up: LookUp = look_up,
) -> jax.Array:
    """The inverse of `quantize_scales`, up to its rounding: fp32 absmax [..., K/b, N].

    levels fp32 [256]: what the codes stand for (an argument, so that a caller whose own operands
    must be explicit can hand it through). part: codes are a part of one weight only, nested and
    offset are of the whole. look_up: how levels are found, where a plain gather is slow.

    Outside jit this has bitsandbytes' bits; under jit XLA may contract it into a fused
    multiply-add, which rounds once instead of twice and so differs in the last bit.
    """
    first, whole = part or (None, codes.shape)
    return _centred(codes, nested, levels, first, tuple(whole), look_up) + offset[..., None, None]


@functools.partial(jax.jit, static_argnames=("whole", "look_up"), inline=True)
def _centred(
    codes: jax.Array,
    nested: jax.Array,
    levels: jax.Array,
    first: Sequence[Any] | None,
    whole: tuple[int, ...],
    look_up: LookUp,
) -> jax.Array:
    """Scales without the offset, which is added by a program of its own outside jit."""
    *lead, rows, n = whole
    spread = jnp.repeat(nested, NESTED_BLOCK, axis=-1)[..., : n * rows].reshape(*lead, n, rows)
    spread = jnp.swapaxes(spread, -1, -2)
    if first is not None:
        spread = jax.lax.dynamic_slice(spread, first, codes.shape)
    return look_up(levels, codes) * spread
