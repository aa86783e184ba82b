"""NF4 matmul on TPU for few rows (decoding text): bound by reading the weight, not by products.

What may cost cycles here is decoding, which has to keep up with the memory. So one look-up decodes
a whole byte, into the pair of bf16 that its two codes stand for, and the scales are applied to the
products of a block instead of to its weights:

    y[n] = sum over blocks b of scale[b, n] * sum over k in b of x[k] * level(code[k, n])

The levels are rounded to bf16 here where the large kernel rounds level * scale: as precise, not
the same bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_decode import LANES, look_up

BLOCK = 64
MOST_ROWS = 32
DEPTH, WIDTH = 1024, 512  # of W in a grid step: 256 KiB of codes, so that a step outlasts its start
CHUNK = 512  # rows of W decoded at a time: few enough to stay in registers


def takes(x: jax.Array, packed: jax.Array, scales: jax.Array) -> bool:
    """Whether this kernel is the better one for these shapes."""
    k = 2 * packed.shape[0]
    standard = k == scales.shape[0] * BLOCK and k % CHUNK == 0
    return x.dtype == jnp.bfloat16 and x.shape[0] <= MOST_ROWS and standard


@functools.partial(jax.jit, static_argnums=(4, 5), inline=True)
def nf4_matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    out_dtype: Any,
    interpret: Any = False,
) -> jax.Array:
    """x bf16 [M, K] times the 4-bit weight [K, N] in blocks of 64 -> [M, N]; M of up to 32."""
    (m, k), n = x.shape, packed.shape[1]
    rows = -(-m // 8) * 8
    depth = DEPTH if k % DEPTH == 0 else CHUNK
    width = min(WIDTH, -(-n // LANES) * LANES)
    return pl.pallas_call(
        functools.partial(_kernel, rows=rows),
        grid=(pl.cdiv(n, width), k // depth),
        in_specs=[
            pl.BlockSpec((depth // (2 * BLOCK), 2 * rows, 2 * BLOCK), lambda j, i: (i, 0, 0)),
            pl.BlockSpec((depth // 2, width), lambda j, i: (i, j)),
            pl.BlockSpec((depth // BLOCK, width), lambda j, i: (i, j)),
            pl.BlockSpec((16, LANES), lambda j, i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, width), lambda j, i: (0, j)),
        out_shape=jax.ShapeDtypeStruct((rows, n), out_dtype),
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="nf4_matmul_rows",
    )(_pairs_of_blocks(x, rows), packed, scales, _pair_tables(codebook))[:m]


def _kernel(
    x_ref: Any, codes_ref: Any, scales_ref: Any, tables_ref: Any, out_ref: Any, sum_ref: Any, *,
    rows: int,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    low, high = tables_ref[:8], tables_ref[8:]
    pairs = CHUNK // (2 * BLOCK)

    total = sum_ref[...]
    for first in range(0, codes_ref.shape[0] // BLOCK, pairs):
        codes = codes_ref[first * BLOCK : (first + pairs) * BLOCK].astype(jnp.int32)
        # A register of lanes holds half of the 256 pairs: bit 7 says which half.
        seven = codes & 127
        words = jnp.where(codes > 127, look_up(high, seven), look_up(low, seven))
        levels = pltpu.bitcast(words, jnp.bfloat16)
        for pair in range(pairs):
            w = levels[pair * 2 * BLOCK : (pair + 1) * 2 * BLOCK]
            at = first + pair
            products = jnp.dot(x_ref[at], w, preferred_element_type=jnp.float32)
            total += products[:rows] * scales_ref[2 * at : 2 * at + 1]
            total += products[rows:] * scales_ref[2 * at + 1 : 2 * at + 2]
    sum_ref[...] = total

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _pairs_of_blocks(x: jax.Array, rows: int) -> jax.Array:
    """x [M, K] -> [K/128, 2 rows, 128]: what the matrix unit multiplies by two blocks at once.

    The first rows hold x for the first block and zeros for the second, the others the reverse, so
    that each block's product comes out by itself. Within a block k is ordered 0, 32, 1, 33, ...:
    a byte holds k and k + 32, and its pair of levels lies in neighbouring rows.
    """
    m, k = x.shape
    x = jnp.pad(x, ((0, rows - m), (0, 0))).reshape(rows, k // (2 * BLOCK), 2, 2, BLOCK // 2)
    x = x.transpose(1, 2, 0, 4, 3).reshape(-1, 2, rows, BLOCK)
    zero = jnp.zeros_like(x[:, 0])
    first = jnp.concatenate([x[:, 0], zero], axis=-1)
    second = jnp.concatenate([zero, x[:, 1]], axis=-1)
    return jnp.concatenate([first, second], axis=1)


def _pair_tables(codebook: jax.Array) -> jax.Array:
    """codebook [16] -> int32 [16, 128]: rows 0-7 the pairs of bytes 0-127, rows 8-15 the others."""
    bits = jax.lax.bitcast_convert_type(codebook.astype(jnp.bfloat16), jnp.uint16)
    byte = jnp.arange(256)
    words = bits[byte & 15].astype(jnp.uint32) | (bits[byte >> 4].astype(jnp.uint32) << 16)
    words = jax.lax.bitcast_convert_type(words, jnp.int32).reshape(2, 1, LANES)
    return jnp.broadcast_to(words, (2, 8, LANES)).reshape(16, LANES)
