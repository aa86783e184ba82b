"""QuantizedArray: a 4-bit weight that stands in a parameter tree where the dense kernel stood."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qlora_jax.errors import QloraError
from qlora_jax.quant import blockwise, codebooks
from qlora_jax.quant.config import CodebookName, QuantConfig, levels
from qlora_jax.quant.implementations import Implementation, rounding
from qlora_jax.quant.placement import Placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A weight W [..., K, N] with W[k, n] = codebook[code[k, n]] * absmax[k // block_size, n].

    codes   uint8 [..., Kp/2, N], packed as pallas_kernels.reference says; Kp: K up to whole blocks
    scales  absmax, fp32 [..., Kp/block_size, N]; or its 8-bit codes, uint8 of that shape, with
    nested  fp32 [..., ceil(Kp/block_size * N / 256)] and
    offset  fp32 [...] (both None without double quantization)

    Leading axes (stacked layers, experts) are the leaves' own, so that jit, scan, vmap and slicing
    work as for any pytree. The weight's own axes may be several on either side: k_shape are the
    contracted ones, n_shape the others, and K, N their products. placement: how K and N are split
    over a mesh, which products go by; None: on one device, or left to the compiler.
    """

    codes: Any
    scales: Any
    nested: Any
    offset: Any
    k_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    n_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    codebook: CodebookName = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    placement: Placement | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.batch_shape, *self.k_shape, *self.n_shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the leaves take; holds for abstract leaves too."""
        return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(self))

    @property
    def double_quant(self) -> bool:
        return self.nested is not None

    def absmax(self) -> jax.Array:
        """The scales in fp32 [..., Kp/block_size, N]."""
        if self.nested is None:
            return self.scales
        return blockwise.dequantize_scales(self.scales, *self.nested_scales())

    def nested_scales(self) -> tuple[jax.Array, ...]:
        """What uint8 scales need to be read: nested absmax, offset, and the levels of their codes;
        nothing where scales are fp32."""
        if self.nested is None:
            return ()
        return self.nested, self.offset, jnp.asarray(codebooks.dynamic_8bit())

    def matrix(self, dtype: Any = None) -> jax.Array:
        """Dense [..., K, N] of `dtype` (the original dtype by default)."""
        return self._matrix(dtype, None)

    def dequantize(
        self, dtype: Any = None, *, implementation: Implementation | None = None
    ) -> jax.Array:
        """Dense array of `shape`, of `dtype` (the original dtype by default).

        implementation: "cuda" for its kernel, which the compiler cannot fuse with what follows;
        QloraError where that is not available. By default XLA's operations.
        """
        return self._matrix(dtype, implementation).reshape(self.shape)

    def _matrix(self, dtype: Any, implementation: Implementation | None) -> jax.Array:
        run = rounding(implementation, self.codes.shape[-1]).dequantize
        table = jnp.asarray(levels(self.codebook))
        dense = run(self.codes, self.absmax(), table, dtype or self.dtype)
        return dense[..., : math.prod(self.k_shape), :]

    def rows(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        """Rows `ids` (in [0, K)) of one weight seen as [K, N], decoded alone -> [*ids, N]."""
        half = self.block_size // 2
        block, within = ids // self.block_size, ids % self.block_size
        packed = self.codes[block * half + within % half]
        codes = jnp.where((within < half)[..., None], packed & 15, packed >> 4)
        table = jnp.asarray(levels(self.codebook))
        return (table[codes] * self.absmax()[block]).astype(dtype or self.dtype)

    def __repr__(self) -> str:
        nested = "+DQ" if self.double_quant else ""
        kind = f"{self.codebook.upper()}-{self.block_size}{nested}"
        if not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(self)):
            # A tree of the same structure with other leaves: shardings, a mask, axis numbers.
            leaves = f"codes={self.codes}, scales={self.scales}, nested={self.nested}"
            return f"QuantizedArray({kind}, {leaves}, offset={self.offset})"
        bits = 8 * self.nbytes / max(self.size, 1)
        return (
            f"QuantizedArray({kind}, shape={self.shape}, dtype={np.dtype(self.dtype).name}, "
            f"{bits:.3f} bits per weight)"
        )


def quantize(
    x: Any,
    config: QuantConfig,
    *,
    name: str = "weight",
    axes: tuple[int, int] = (1, 1),
    implementation: Implementation | None = None,
) -> QuantizedArray:
    """Quantize x [..., *K axes, *N axes] in blocks along K.

    axes: how many trailing axes are contracted and how many are outputs, e.g. (1, 2) for an
    attention kernel [D, H, Dh]; the axes before them stack weights, each quantized on its own.
    A ShapeDtypeStruct gives an abstract QuantizedArray. Works under jit; outside it, elements that
    are not finite (a NaN would silently poison its block) or larger than 2^126 raise QloraError
    with `name`. implementation: "cuda" for its kernel, with the same result; by default XLA's
    operations.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        _check(x, name, axes)
        return jax.eval_shape(lambda: _quantize(jnp.zeros(x.shape, x.dtype), config, axes, None))
    x = jnp.asarray(x)
    _check(x, name, axes)
    if not isinstance(x, Tracer):
        if not _all_usable(x):
            raise QloraError(
                f"{name}: {_count_unusable(x)} of {x.size} elements are not finite (or beyond "
                "2^126); such a weight cannot be quantized: check the checkpoint it came from"
            )
        return _quantize_jit(x, config, axes, implementation)
    return _quantize(x, config, axes, implementation)


def _check(x: Any, name: str, axes: tuple[int, int]) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise QloraError(f"{name}: only floating-point weights can be quantized, got {x.dtype}")
    if x.ndim < sum(axes) or 0 in x.shape:
        raise QloraError(
            f"{name}: cannot quantize shape {x.shape} with {axes[0]} contracted "
            f"and {axes[1]} output axes"
        )


def _quantize(
    x: jax.Array,
    config: QuantConfig,
    axes: tuple[int, int],
    implementation: Implementation | None,
) -> QuantizedArray:
    lead = x.ndim - sum(axes)
    k_shape, n_shape = x.shape[lead : lead + axes[0]], x.shape[lead + axes[0] :]
    matrix = x.reshape(*x.shape[:lead], math.prod(k_shape), math.prod(n_shape))
    run = rounding(implementation, matrix.shape[-1]).quantize
    codes, absmax = run(matrix, levels(config.codebook), config.block_size)
    scales, nested, offset = absmax, None, None
    if config.double_quant:
        scales, nested, offset = blockwise.quantize_scales(absmax)
    return QuantizedArray(
        codes=codes,
        scales=scales,
        nested=nested,
        offset=offset,
        k_shape=k_shape,
        n_shape=n_shape,
        dtype=x.dtype,
        codebook=config.codebook,
        block_size=config.block_size,
    )


_quantize_jit = jax.jit(_quantize, static_argnums=(1, 2, 3))


# "Not small enough" rather than "too large", so that NaN counts.
def _usable(x: jax.Array) -> jax.Array:
    return jnp.abs(x).astype(jnp.float32) <= blockwise.LARGEST


# Asked before counting, for which XLA on a CPU keeps four bytes for each element instead of one.
@jax.jit
def _all_usable(x: jax.Array) -> jax.Array:
    return jnp.all(_usable(x))


@jax.jit
def _count_unusable(x: jax.Array) -> jax.Array:
    return jnp.sum(~_usable(x))
