"""Random 4-bit weights for the kernels' tests, decoded independently, and what a product may
differ by."""

import jax.numpy as jnp
import numpy as np

# By which a decoded number is rounded to x's dtype; fp32: by which its products are.
EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-20}


def weight(rng: np.random.Generator, k: int, n: int, block: int):
    """codes, scales fp32, codebook; and the dense weight in float64."""
    codes = rng.integers(0, 16, (k // block, block, n))
    scales = rng.uniform(0.5, 2, (k // block, n)).astype(np.float32)
    codebook = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    dense = (codebook.astype(np.float64)[codes] * scales[:, None]).reshape(k, n)
    packed = codes[:, : block // 2] | codes[:, block // 2 :] << 4
    packed = packed.reshape(k // 2, n).astype(np.uint8)
    return (jnp.asarray(packed), jnp.asarray(scales), jnp.asarray(codebook)), dense


def double_quantized(rng: np.random.Generator, blocks: int, n: int):
    """(scales uint8 [blocks, n], nested, offset, levels) and the fp32 scales that they mean."""
    levels = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
    codes = rng.integers(0, 256, (blocks, n)).astype(np.uint8)
    nested = rng.uniform(0.1, 1, -(-blocks * n // 256)).astype(np.float32)
    offset = np.float32(2)
    group = (np.arange(n)[None, :] * blocks + np.arange(blocks)[:, None]) // 256
    scales = levels[codes] * nested[group] + offset  # NumPy rounds twice, as the kernels do
    return tuple(map(jnp.asarray, (codes, nested, offset, levels))), scales


def check(got, x, dense, out_dtype: str) -> None:
    """got against x [M, K] @ dense [K, N] in float64."""
    exact = np.asarray(x, np.float64)
    want = exact @ dense
    assert got.shape == want.shape and got.dtype == out_dtype
    size = np.sqrt((exact**2) @ (dense**2))  # of the terms of each sum, in quadrature
    allowed = 4 * EPS[x.dtype.name] * size + EPS.get(out_dtype, 0) * np.abs(want) + 1e-30
    error = np.abs(np.asarray(got, np.float64) - want)
    assert (error <= allowed).all(), (error / allowed).max()
