"""The one place that knows of qlora-jax-cuda, the compiled kernels of cuda_ext.

Only its absence is tolerated: a package that is there and does not load raises.
"""

import functools
import importlib
import importlib.util
from typing import Any

import jax

PACKAGE = "qlora_cuda"


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


def nf4_matmul(x: jax.Array, *weight: jax.Array, **how: Any) -> jax.Array:
    return _package().nf4_matmul(x, *weight, **how)


def nf4_matmul_transposed(x: jax.Array, *weight: jax.Array, **how: Any) -> jax.Array:
    return _package().nf4_matmul_transposed(x, *weight, **how)
