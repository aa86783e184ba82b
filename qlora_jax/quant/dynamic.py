"""The dynamic 8-bit maps by arithmetic, without looking anything up.

A table lookup takes nanoseconds a number on a TPU, which has no instruction for it; comparisons and
multiplications fuse with what is around them. Numbers are those of `codebooks.dynamic_8bit` up to
fp32 rounding (one part in 2^22).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.quant import codebooks


class _Decade(NamedTuple):
    """Levels 10^(i-7) to 10^(i-6), the middles of `count` equal intervals.

    code   of the first level, counted from that of zero
    start  where the first interval begins
    width  of an interval
    above  the largest number that still rounds to the level before the first
    """

    code: int
    count: int
    start: float
    width: float
    above: float


def _decades(signed: bool) -> tuple[list[_Decade], int, float]:
    """Ascending; then the code of 1.0, and the largest number that rounds to a lower level."""
    levels = codebooks.dynamic_8bit(signed)
    levels = levels[levels >= 0]
    edges = codebooks.midpoints(levels)
    decades, code = [], 1
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        start, width = 10.0 ** (i - 7), 0.9 * 10.0 ** (i - 6) / count
        decades.append(_Decade(code, count, start, width, float(edges[code - 1])))
        code += count
    return decades, code, float(edges[code - 1])


def encode(x: jax.Array, signed: bool) -> jax.Array:
    """uint8 codes of the levels nearest to fp32 x, in [-1, 1] (signed) or [0, 1]."""
    decades, one, above = _decades(signed)
    magnitude = jnp.abs(x)
    code = jnp.zeros(x.shape, jnp.int32)
    for d in decades:
        interval = jnp.floor((magnitude - np.float32(d.start)) * np.float32(1 / d.width))
        interval = jnp.clip(interval, 0, d.count - 1).astype(jnp.int32)
        code = jnp.where(magnitude > np.float32(d.above), d.code + interval, code)
    code = jnp.where(magnitude > np.float32(above), one, code)
    if signed:  # there is 1, but no -1
        code = 127 + jnp.where(x < 0, -jnp.minimum(code, one - 1), code)
    return code.astype(jnp.uint8)


def decode(codes: jax.Array, signed: bool) -> jax.Array:
    """fp32 levels of uint8 codes."""
    decades, one, _ = _decades(signed)
    code = codes.astype(jnp.int32) - (127 if signed else 0)
    magnitude = jnp.abs(code)
    level = jnp.zeros(codes.shape, jnp.float32)
    for d in decades:
        interval = (magnitude - d.code).astype(jnp.float32)
        middle = np.float32(d.start + d.width / 2) + interval * np.float32(d.width)
        level = jnp.where(magnitude >= d.code, middle, level)
    level = jnp.where(magnitude == one, np.float32(1), level)
    return jnp.where(code < 0, -level, level)
