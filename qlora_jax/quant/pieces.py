"""The products with a large 4-bit weight in XLA's own operations, a piece of it decoded at a time.

Decoded as a whole, one weight of LLaMA-65B's MLP takes 344 MiB, and XLA would decode several at
once: those of a layer that share an input. Loops run one after the other.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import reference

LIMIT = 2**25
"""Numbers in a piece: 64 MiB of bf16, enough to keep matrix units busy."""


def is_large(codes: jax.Array) -> bool:
    """Whether a weight [K, N] of packed codes [K/2, N] is to be decoded in pieces."""
    return 2 * codes.size > LIMIT


def nf4_matmul(
    x: jax.Array, codes: jax.Array, scales: jax.Array, codebook: jax.Array, *, out_dtype: Any,
    precision: Any,
) -> jax.Array:  # fmt: skip
    """`reference.nf4_matmul`, in pieces along N."""
    n = codes.shape[1]
    count = _count(n, 2 * codes.shape[0])
    width = n // count

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        c, s = (jax.lax.dynamic_slice_in_dim(leaf, i * width, width, 1) for leaf in (codes, scales))
        part = reference.nf4_matmul(x, c, s, codebook, out_dtype=out_dtype, precision=precision)
        return jax.lax.dynamic_update_slice_in_dim(out, part, i * width, 1)

    return jax.lax.fori_loop(0, count, step, jnp.zeros((x.shape[0], n), out_dtype))


def nf4_matmul_transposed(
    g: jax.Array, codes: jax.Array, scales: jax.Array, codebook: jax.Array, *, out_dtype: Any,
    precision: Any,
) -> jax.Array:  # fmt: skip
    """`reference.nf4_matmul_transposed`, in pieces of whole blocks along K."""
    blocks, n = scales.shape
    half = codes.shape[0] // blocks
    count = _count(blocks, 2 * half * n)
    rows = blocks // count

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        c = jax.lax.dynamic_slice_in_dim(codes, i * rows * half, rows * half)
        s = jax.lax.dynamic_slice_in_dim(scales, i * rows, rows)
        part = reference.nf4_matmul_transposed(
            g, c, s, codebook, out_dtype=out_dtype, precision=precision
        )
        return jax.lax.dynamic_update_slice_in_dim(out, part, i * part.shape[1], 1)

    out = jnp.zeros((g.shape[0], 2 * codes.shape[0]), out_dtype)
    return jax.lax.fori_loop(0, count, step, out)


def _count(length: int, each: int) -> int:
    """How many equal pieces `length`, of `each` numbers, is cut into; 1 if nothing near divides."""
    enough = -(-length * each // LIMIT)
    return next((n for n in range(enough, 4 * enough) if length % n == 0), 1)
