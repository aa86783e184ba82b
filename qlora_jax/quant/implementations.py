"""Which code computes a 4-bit matmul: one contract, several implementations.

Each is a pair of functions over plain arrays, (x [M, K], codes, scales, codebook, *nested) ->
[M, N] and the transposed product, with the meaning that pallas_kernels.reference gives them.
nested: nothing where scales are fp32, else the nested absmax, the offset and the levels of uint8
scales.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import gpu, reference, tpu, tpu_scales
from qlora_jax.errors import QloraError
from qlora_jax.quant import blockwise, cuda, pieces
from qlora_jax.quant.kernel_call import kernel_call

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu", "cuda"]


class Products(NamedTuple):
    """The two products of an implementation, where they run and what they take.

    platform: the only one on which they run, as JAX lowers for it. unavailable: why they do not run
    on this machine, or None. unsupported(k, n, block_size, dtype of x): why they do not take that,
    or None. by_default: whether the platform chooses them; otherwise only their name does.
    """

    matmul: Callable[..., jax.Array]
    transposed: Callable[..., jax.Array]
    platform: str | None = None
    unavailable: Callable[[], str | None] = lambda: None
    unsupported: Callable[[int, int, int, Any], str | None] = lambda *_: None
    by_default: bool = True


def _plain(
    product: Callable[..., jax.Array], in_pieces: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """`product` in JAX's own operations, which vmap and the compiler's sharding see through; for
    large weights `in_pieces`, a `kernel_call`."""

    def call(
        x: jax.Array, codes: jax.Array, scales: jax.Array, codebook: jax.Array,
        *nested: jax.Array, part: blockwise.Part | None = None, **how: Any,
    ) -> jax.Array:  # fmt: skip
        if pieces.is_large(codes):
            return in_pieces(x, codes, scales, codebook, *nested, part=part, **how)
        if nested:
            scales = blockwise.dequantize_scales(scales, *nested, part=part)
        return product(x, codes, scales, codebook, **how)

    return call


def _floats_only(k: int, n: int, block_size: int, dtype: Any) -> str | None:
    name = jnp.dtype(dtype).name
    takes = ("bfloat16", "float32")
    return None if name in takes else f"x must be {' or '.join(takes)}, got {name}"


IMPLEMENTATIONS: dict[str, Products] = {
    "xla": Products(
        _plain(reference.nf4_matmul, kernel_call(pieces.nf4_matmul, transposed=False)),
        _plain(
            reference.nf4_matmul_transposed,
            kernel_call(pieces.nf4_matmul_transposed, transposed=True),
        ),
    ),
    "pallas_tpu": Products(
        kernel_call(tpu.nf4_matmul, transposed=False, look_up=tpu_scales.look_up),
        kernel_call(tpu.nf4_matmul_transposed, transposed=True, look_up=tpu_scales.look_up),
        platform="tpu",
        unavailable=tpu.unavailable,
        unsupported=_floats_only,
    ),
    "cuda": Products(
        kernel_call(cuda.nf4_matmul, transposed=False, reads_nested=cuda.reads_nested),
        kernel_call(
            cuda.nf4_matmul_transposed, transposed=True, reads_nested=cuda.reads_nested_transposed
        ),
        platform="cuda",
        unavailable=cuda.unavailable,
        unsupported=cuda.unsupported,
    ),
    # By name until a Hopper GPU has run it: what its simulation cannot see is said in
    # tests/pallas_kernels/test_gpu.py.
    "pallas_gpu": Products(
        kernel_call(gpu.nf4_matmul, transposed=False),
        kernel_call(gpu.nf4_matmul_transposed, transposed=True),
        platform="cuda",
        unavailable=gpu.unavailable,
        unsupported=gpu.unsupported,
        by_default=False,
    ),
}
assert set(IMPLEMENTATIONS) == set(get_args(Implementation))

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


class Rounding(NamedTuple):
    """To 4 bits and back: (x [..., K, N], codebook, block_size) -> codes and absmax, and
    (codes, scales fp32, codebook, dtype) -> dense, as blockwise and pallas_kernels.reference do."""

    quantize: Callable[..., tuple[jax.Array, jax.Array]]
    dequantize: Callable[..., jax.Array]


def rounding(name: Implementation | None, n: int) -> Rounding:
    """XLA's operations by default; "cuda" its kernels, for N = n outputs. A name that cannot run,
    and one that has products only, raise QloraError."""
    if name is None or name == "xla":
        return Rounding(blockwise.quantize, reference.dequantize)
    _known(name)
    if name != "cuda":
        raise QloraError(f"implementation={name!r} has products only, it does not quantize")
    reason = cuda.unavailable() if _forced.get() is None else None
    if reason is None and n % 16:
        reason = f"N must be a multiple of 16, got {n}"
    if reason:
        raise QloraError(f"implementation={name!r} cannot be used: {reason}")
    return Rounding(cuda.quantize, cuda.dequantize)


def product(
    name: Implementation | None, x: jax.Array, weight: tuple[Any, ...], transposed: bool, **how: Any
) -> jax.Array:
    """x times the weight (codes, scales, codebook, *nested), or times its transpose.

    name None: the kernels of the platform that the program is lowered for, where they take such an
    x and such a weight, else `xla`. A name that cannot run raises QloraError. part: which part of
    a larger weight it is, if it is one (see `blockwise.dequantize_scales`).
    """
    k, n, blocks = 2 * weight[0].shape[0], weight[0].shape[1], weight[1].shape[0]
    problem = (k, n, k // blocks, x.dtype)
    forced = _forced.get()
    if name is not None or forced is not None:
        chosen = _known(name or forced)
        reason = chosen.unavailable() if forced is None else None
        if reason := reason or chosen.unsupported(*problem):
            raise QloraError(f"implementation={name or forced!r} cannot be used: {reason}")
        return _run(chosen, transposed, **how)(x, *weight)
    default = IMPLEMENTATIONS["xla"]
    here = {
        kernels.platform: _run(kernels, transposed, **how)
        for kernels in IMPLEMENTATIONS.values()
        if kernels.platform
        and kernels.by_default
        and not kernels.unavailable()
        and not kernels.unsupported(*problem)
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
