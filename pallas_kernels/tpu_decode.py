"""Decoding a tile of a 4-bit weight in VMEM, for the TPU kernels."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128  # of a vector register


def level_table(codebook: jax.Array, sublanes: bool) -> jax.Array:
    """codebook [16] -> the registers that `look_up` gathers from, fp32.

    sublanes: [16, 128], level i all along row i; otherwise [8, 128], the levels along each row.
    """
    levels = codebook.astype(jnp.float32)
    if sublanes:
        return jnp.broadcast_to(levels[:, None], (16, LANES))
    return jnp.broadcast_to(jnp.pad(levels, (0, LANES - 16)), (SUBLANES, LANES))


def look_up(table: jax.Array, codes: jax.Array) -> jax.Array:
    """codes int32 [R, C] in [0, 16), R and C multiples of 8 and 128 -> levels fp32 [R, C].

    A register at a time, by the gather that the chip does in hardware. From v5 on that is one
    vector operation within a column of eight sublanes: two of them and a select make sixteen
    entries. v4 gathers along the 128 lanes only, where the
    cross-lane unit takes several cycles. A tree of fifteen selects was slower than either. The
    schedules that say so are printed by benchmarks/tpu_schedule.py.
    """
    rows = []
    for r in range(0, codes.shape[0], SUBLANES):
        row = []
        for c in range(0, codes.shape[1], LANES):
            register = codes[r : r + SUBLANES, c : c + LANES]
            if table.shape[0] == SUBLANES:
                row.append(gather(table, register, axis=1))
            else:
                three_bits = register & 7
                low = gather(table[:SUBLANES], three_bits, axis=0)
                high = gather(table[SUBLANES:], three_bits, axis=0)
                row.append(jnp.where(register > 7, high, low))
        rows.append(jnp.concatenate(row, axis=1))
    return jnp.concatenate(rows)


def gather(table: jax.Array, indices: jax.Array, axis: int) -> jax.Array:
    """Of one register, as the chip does it: indices and table have the same shape."""
    return jnp.take_along_axis(table, indices, axis=axis, mode="promise_in_bounds")


def decode_tile(
    codes: jax.Array, scales: jax.Array, table: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """codes uint8 [K/2, N] and scales fp32 [K/block, N] of a tile -> dense [K, N] of `dtype`.

    N is a multiple of 128. The product is taken in fp32 and rounded once.
    """
    half = codes.shape[0] // scales.shape[0]
    wide = codes.astype(jnp.int32)
    blocks = []
    for index in range(scales.shape[0]):
        packed = wide[index * half : (index + 1) * half]
        levels = jnp.concatenate([look_up(table, packed & 15), look_up(table, packed >> 4)])
        blocks.append((levels * scales[index : index + 1]).astype(dtype))
    return jnp.concatenate(blocks)


def zero_beyond(x: jax.Array, size: jax.Array, axis: int) -> jax.Array:
    """x [R, C] with zeros from index `size` on along `axis`; axis 0 for 32-bit x only."""
    # As 32-bit words, since Mosaic has no masks for halves of them; rows share a word, not columns.
    words = pltpu.bitcast(x, jnp.int32)
    index = jax.lax.broadcasted_iota(jnp.int32, words.shape, axis)
    return pltpu.bitcast(jnp.where(index < size, words, 0), x.dtype)
