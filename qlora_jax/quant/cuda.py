"""The one place that knows of qlora-jax-cuda, the compiled kernels of cuda_ext.

Only its absence is tolerated: a package that is there and does not load raises.
"""

import functools
import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PACKAGE = "qlora_cuda"

MANY_ROWS = 128
"""From so many rows of x on, a kernel writes W dense and cuBLAS multiplies: faster then than our
fused kernels (on an H200 these took 0.93 and 1.47 times as long with 128 rows, forward and
transposed, 0.81 and 0.87 with 64)."""


@functools.cache
def _package() -> Any:
    return importlib.import_module(PACKAGE) if importlib.util.find_spec(PACKAGE) else None


def unavailable() -> str | None:
    """Why the kernels do not run here; None where they do."""
    package = _package()
    if package is None:
        return "qlora-jax-cuda is not installed: pip install ./cuda_ext, in a checkout of qlora-jax"
    return package.unavailable()


def unsupported(k: int, n: int, block_size: int, dtype: Any) -> str | None:
    """Why the kernels do not take such a weight or such an x; None where they do."""
    return _package().unsupported(k, n, block_size, dtype)


def reads_nested(rows: int) -> bool:
    """Whether `nf4_matmul` takes scales in 8 bits for so many rows of x."""
    return rows <= _package().FEW_ROWS or rows >= MANY_ROWS


def reads_nested_transposed(rows: int) -> bool:
    """The same of `nf4_matmul_transposed`."""
    return rows >= MANY_ROWS


def dequantize(codes: jax.Array, scales: jax.Array, codebook: jax.Array, dtype: Any) -> jax.Array:
    """reference.dequantize of codes [..., K/2, N] and fp32 scales [..., K/block, N]."""
    *lead, half_k, n = codes.shape
    # Stacked weights are one tall weight, as every block of theirs is whole.
    dense = _package().dequantize(
        codes.reshape(-1, n), scales.reshape(-1, n), codebook, dtype=dtype
    )
    return dense.reshape(*lead, 2 * half_k, n)


def quantize(x: jax.Array, codebook: np.ndarray, block_size: int) -> tuple[jax.Array, jax.Array]:
    """blockwise.quantize of x [..., K, N]: the same codes and absmax to the bit."""
    *lead, k, n = x.shape
    if lead:
        x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -k % block_size), (0, 0)])
    codes, absmax = _package().quantize(x.reshape(-1, n), codebook, block_size)
    return codes.reshape(*lead, -1, n), absmax.reshape(*lead, -1, n)


def nf4_matmul(
    x: jax.Array, codes: jax.Array, scales: jax.Array, codebook: jax.Array, *nested: jax.Array,
    out_dtype: Any, precision: Any,
) -> jax.Array:  # fmt: skip
    """reference.nf4_matmul of x [M, K]; nested: of scales in 8 bits, see `reads_nested`."""
    if x.shape[0] >= MANY_ROWS:
        x, codebook = _once_there(x, codebook)
        w = _package().dequantize(codes, scales, codebook, *nested, dtype=x.dtype)
        return jnp.dot(x, w, precision=precision, preferred_element_type=out_dtype)
    how = {"out_dtype": out_dtype, "precision": precision}
    return _package().nf4_matmul(x, codes, scales, codebook, *nested, **how)


def nf4_matmul_transposed(
    g: jax.Array, codes: jax.Array, scales: jax.Array, codebook: jax.Array, *nested: jax.Array,
    out_dtype: Any, precision: Any,
) -> jax.Array:  # fmt: skip
    """g [M, N] times the transposed weight; nested: see `reads_nested_transposed`."""
    if g.shape[0] >= MANY_ROWS:
        g, codebook = _once_there(g, codebook)
        w = _package().dequantize(codes, scales, codebook, *nested, dtype=g.dtype)
        return jnp.dot(g, w.T, precision=precision, preferred_element_type=out_dtype)
    how = {"out_dtype": out_dtype, "precision": precision}
    return _package().nf4_matmul_transposed(g, codes, scales, codebook, **how)


def _once_there(x: jax.Array, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, the codebook not before x: else XLA writes all weights of a layer at its beginning.

    Nothing else of a weight is made to wait. What waits XLA copies out of the stack of layers; of
    what does not it gives the kernel the address, where it can.
    """
    return jax.lax.optimization_barrier((x, codebook))
