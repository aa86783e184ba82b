"""Which code computes a 4-bit matmul: one contract, several implementations.

Each is a pair of functions over plain arrays, (x [M, K], codes, scales, codebook, out_dtype,
precision) -> [M, N] and the transposed product, with the meaning that pallas_kernels.reference
gives them.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax

from pallas_kernels import reference, tpu
from qlora_jax.errors import QloraError
from qlora_jax.quant.kernel_call import kernel_call

Implementation = Literal["xla", "pallas_tpu"]


class Products(NamedTuple):
    """The two products of an implementation, and the only platform on which they run."""

    matmul: Callable[..., jax.Array]
    transposed: Callable[..., jax.Array]
    platform: str | None = None
    dtypes: tuple[str, ...] = ()
    unavailable: Callable[[], str | None] = lambda: None


IMPLEMENTATIONS: dict[str, Products] = {
    "xla": Products(reference.nf4_matmul, reference.nf4_matmul_transposed),
    "pallas_tpu": Products(
        kernel_call(tpu.nf4_matmul, transposed=False),
        kernel_call(tpu.nf4_matmul_transposed, transposed=True),
        platform="tpu",
        dtypes=("bfloat16", "float32"),
        unavailable=tpu.unavailable,
    ),
}

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("implementation", default=None)


@contextlib.contextmanager
def use_implementation(implementation: Implementation) -> Iterator[None]:
    """Everything traced inside takes `implementation`, also for devices that are not here.

    For measurements, and for compiling without a device; otherwise the platform decides. A function
    that jit has compiled before keeps what it was compiled with.
    """
    _known(implementation)
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


def backends() -> dict[str, str]:
    """Name of each implementation -> "available", or why it is not on this machine."""
    return {
        name: products.unavailable() or "available" for name, products in IMPLEMENTATIONS.items()
    }


def product(
    name: Implementation | None, x: jax.Array, weight: tuple[Any, ...], transposed: bool, **how: Any
) -> jax.Array:
    """x times the weight (codes, scales, codebook), or times its transpose.

    name None: the kernels of the platform that the program is lowered for, where they take x's
    dtype, else `xla`. A name that cannot run raises QloraError.
    """
    forced = _forced.get()
    if name is not None or forced is not None:
        chosen = _known(name or forced)
        if name is not None and forced is None and (reason := chosen.unavailable()):
            raise QloraError(f"implementation={name!r} is not available: {reason}")
        if chosen.dtypes and x.dtype.name not in chosen.dtypes:
            takes = " or ".join(chosen.dtypes)
            raise QloraError(f"implementation={name or forced!r} takes {takes}, got {x.dtype}")
        return _run(chosen, transposed, **how)(x, *weight)
    default = IMPLEMENTATIONS["xla"]
    here = {
        kernels.platform: _run(kernels, transposed, **how)
        for kernels in IMPLEMENTATIONS.values()
        if kernels.platform and not kernels.unavailable() and x.dtype.name in kernels.dtypes
    }
    if not here:
        return _run(default, transposed, **how)(x, *weight)
    return jax.lax.platform_dependent(x, *weight, default=_run(default, transposed, **how), **here)


def _run(products: Products, transposed: bool, **how: Any) -> Callable[..., jax.Array]:
    return functools.partial(products.transposed if transposed else products.matmul, **how)


def _known(name: str | None) -> Products:
    if name not in IMPLEMENTATIONS:
        raise QloraError(f"implementation={name!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]
