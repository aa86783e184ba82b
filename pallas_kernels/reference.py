"""The plain-JAX meaning of every kernel: what each must compute, and what runs where none does.

Layout of a 4-bit weight of K x N (K contraction, N output), cut along K in blocks of `block_size`:
codes uint8 [K/2, N]; inside a block, byte row i holds k = i in its low nibble and
k = i + block_size/2 in its high one, so that unpacking is a concatenation and never an interleave.
scales fp32 [K/block_size, N]. codebook fp32 [16].
"""

import functools

import jax
import jax.numpy as jnp


def pack(codes: jax.Array, block_size: int) -> jax.Array:
    """4-bit codes uint8 [..., K, N], one a byte -> packed uint8 [..., K/2, N]."""
    *lead, k, n = codes.shape
    halves = codes.reshape(*lead, k // block_size, 2, block_size // 2, n)
    packed = halves[..., 0, :, :] | (halves[..., 1, :, :] << 4)
    return packed.reshape(*lead, k // 2, n)


def unpack(packed: jax.Array, block_size: int) -> jax.Array:
    """The inverse of `pack`: uint8 [..., K/2, N] -> codes uint8 [..., K, N]."""
    *lead, half_k, n = packed.shape
    blocks = packed.reshape(*lead, 2 * half_k // block_size, block_size // 2, n)
    codes = jnp.concatenate([blocks & 15, blocks >> 4], axis=-2)
    return codes.reshape(*lead, 2 * half_k, n)


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def dequantize(
    packed: jax.Array, scales: jax.Array, codebook: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Packed codes [..., K/2, N], scales [..., K/block, N] -> dense [..., K, N] of `dtype`.

    The product is taken in fp32 and rounded once, as bitsandbytes does. Compiled, also where
    nothing around it is: op by op, a large weight's codes and products would be in memory at once.
    """
    *lead, half_k, n = packed.shape
    blocks = scales.shape[-2]
    block_size = 2 * half_k // blocks
    # An index of four bits cannot leave a table of sixteen, so no clamping is asked for: on CPU
    # that alone is worth a fifth of the time.
    values = codebook.at[unpack(packed, block_size)].get(mode="promise_in_bounds")
    values = values.reshape(*lead, blocks, block_size, n) * scales[..., :, None, :]
    return values.reshape(*lead, 2 * half_k, n).astype(dtype)


def nf4_matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    out_dtype: jax.typing.DTypeLike,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """x [M, K] times the 4-bit weight [K, N] -> [M, N], accumulated in fp32."""
    w = dequantize(packed, scales, codebook, x.dtype)
    product = jnp.dot(x, w, preferred_element_type=jnp.float32, precision=precision)
    return product.astype(out_dtype)


def nf4_matmul_transposed(
    g: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    out_dtype: jax.typing.DTypeLike,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """g [M, N] times the transposed 4-bit weight -> [M, K], accumulated in fp32."""
    w = dequantize(packed, scales, codebook, g.dtype)
    dims = (((1,), (1,)), ((), ()))
    product = jax.lax.dot_general(
        g, w, dims, preferred_element_type=jnp.float32, precision=precision
    )
    return product.astype(out_dtype)
