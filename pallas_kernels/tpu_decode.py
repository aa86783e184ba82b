"""Decoding a tile of a 4-bit weight in VMEM, for the TPU kernels."""

import jax
import jax.numpy as jnp

LANES = 128


def lane_table(codebook: jax.Array) -> jax.Array:
    """codebook [16] -> fp32 [8, 128]: a register with the sixteen levels in its first lanes."""
    row = jnp.pad(codebook.astype(jnp.float32), (0, LANES - codebook.shape[0]))
    return jnp.broadcast_to(row, (8, LANES))


def look_up(table: jax.Array, indices: jax.Array) -> jax.Array:
    """table [8, 128] (rows alike), indices int32 [R, C] in [0, 128) -> the entries, [R, C].

    One gather across the lanes of a register (tpu.dynamic_gather) for 1024 entries. A tree of
    selects on the four bits costs fifteen vector operations instead, and what is free while the
    matrix unit works is the cross-lane unit: on v5e a whole step of 1024 x 512 x 512 then takes as
    many cycles as with dense weights, within 1% (benchmarks/tpu_schedule.py).
    """
    table = jnp.broadcast_to(table[:1], (indices.shape[0], LANES))
    columns = [
        jnp.take_along_axis(
            table[:, : indices.shape[1]] if indices.shape[1] < LANES else table,
            indices[:, at : at + LANES],
            axis=1,
            mode="promise_in_bounds",
        )
        for at in range(0, indices.shape[1], LANES)
    ]
    return jnp.concatenate(columns, axis=1) if len(columns) > 1 else columns[0]


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
        values = jnp.concatenate([look_up(table, packed & 15), look_up(table, packed >> 4)])
        blocks.append((values * scales[index : index + 1]).astype(dtype))
    return jnp.concatenate(blocks)


def zero_beyond(x: jax.Array, size: jax.Array, axis: int) -> jax.Array:
    """x [., .] with zeros from index `size` on along `axis`."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(index < size, x, jnp.zeros_like(x))
