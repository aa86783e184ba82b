"""Rounding blocks of numbers to a code book: the rules of bitsandbytes, to the bit, in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.quant import codebooks
from qlora_jax.quant.config import CodebookName

NESTED_BLOCK = 256
"""How many absmax values share one nested absmax under double quantization."""

_FP4_THRESHOLDS = np.asarray(
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32
)
_FP4_ASCENDING = np.asarray([0, 1, 6, 7, 4, 5, 2, 3], np.uint8)  # codes by rising magnitude


def absmax_codes(x: jax.Array, codebook: CodebookName, block_size: int) -> tuple[jax.Array, jax.Array]:
    """Round x [..., K, N] in blocks along K -> (codes uint8 [..., Kp, N], absmax fp32 [..., Kp/b, N]).

    Kp is K rounded up to the block size; padding holds the code of zero and takes no part in absmax.
    x is multiplied by fp32 1/absmax and compared with fp32 midpoints, a tie going to the lower code.
    """
    *lead, k, n = x.shape
    padding = -k % block_size
    if padding:
        x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, padding), (0, 0)])
    blocks = x.astype(jnp.float32).reshape(*lead, (k + padding) // block_size, block_size, n)
    absmax = jnp.max(jnp.abs(blocks), axis=-2)
    # A block of zeros takes the exact zero code: under double quantization its absmax comes back
    # as a small non-zero number, and only code 7 (NF4) or 0 (FP4) survives that as zero.
    inverse = jnp.where(absmax > 0, 1.0 / absmax, 0.0)
    scaled = blocks * inverse[..., :, None, :]
    round_to = {"nf4": _nearest_nf4, "fp4": _nearest_fp4}[codebook]
    return round_to(scaled).reshape(*lead, k + padding, n), absmax


def _nearest_nf4(x: jax.Array) -> jax.Array:
    thresholds = codebooks.midpoints(codebooks.nf4())
    return _count_above(x, thresholds)


def _nearest_fp4(x: jax.Array) -> jax.Array:
    magnitude = jnp.asarray(_FP4_ASCENDING)[_count_above(jnp.abs(x), _FP4_THRESHOLDS)]
    return jnp.where(x < 0, magnitude | 8, magnitude).astype(jnp.uint8)


def _count_above(x: jax.Array, thresholds: np.ndarray) -> jax.Array:
    """How many of the ascending thresholds lie strictly below each x: the index of its level."""
    count = jnp.zeros(x.shape, jnp.uint8)
    for threshold in thresholds:
        count += (x > threshold).astype(jnp.uint8)
    return count


def quantize_scales(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Double quantization of absmax [..., K/b, N] -> (codes uint8 of that shape, nested, offset).

    nested: fp32 [..., ceil(K/b * N / 256)], one absmax for 256 scales; offset: fp32 [...], the mean.
    The scales are grouped as bitsandbytes' [out, in] weight has them: column after column of ours.
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


def dequantize_scales(codes: jax.Array, nested: jax.Array, offset: jax.Array) -> jax.Array:
    """The inverse of `quantize_scales`, up to its rounding: fp32 absmax [..., K/b, N]."""
    *lead, rows, n = codes.shape
    table = jnp.asarray(codebooks.dynamic_8bit())
    flat = table.at[jnp.swapaxes(codes, -1, -2).reshape(*lead, n * rows)].get(mode="promise_in_bounds")
    spread = jnp.repeat(nested, NESTED_BLOCK, axis=-1)[..., : n * rows]
    absmax = flat * spread + offset[..., None]
    return jnp.swapaxes(absmax.reshape(*lead, n, rows), -1, -2)
