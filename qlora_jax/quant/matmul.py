"""x @ W and g @ W^T with W in 4 bits; the gradient flows to x only, W being frozen."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import reference
from qlora_jax.quant.array import QuantizedArray
from qlora_jax.quant.config import levels
from qlora_jax.quant.varying import vary_alike


def nf4_matmul(
    x: jax.Array, w: QuantizedArray, *, out_dtype: Any = None, precision: Any = None
) -> jax.Array:
    """x [..., K] @ W [K, N] -> [..., N] of `out_dtype` (x's by default), accumulated in fp32.

    The backward product g @ W^T decodes the same 4-bit weight again: no dense W is kept between
    the passes. W must have no leading axes; jax.vmap over it where it has. precision: as in
    jax.lax.dot_general.
    """
    return _apply(_matmul, x, w, out_dtype, precision, math.prod(w.k_shape))


def nf4_matmul_transposed(
    g: jax.Array, w: QuantizedArray, *, out_dtype: Any = None, precision: Any = None
) -> jax.Array:
    """g [..., N] @ W^T [N, K] -> [..., K] of `out_dtype` (g's by default), accumulated in fp32."""
    return _apply(_matmul_transposed, g, w, out_dtype, precision, math.prod(w.n_shape))


def _apply(
    product: Any, x: jax.Array, w: QuantizedArray, out_dtype: Any, precision: Any, width: int
) -> jax.Array:
    if w.batch_shape:
        raise ValueError(f"expected one weight, got {w.batch_shape} stacked; use jax.vmap")
    if x.shape[-1] != width:
        raise ValueError(f"x [..., {x.shape[-1]}] does not fit {w}: its last axis must be {width}")
    x, w = vary_alike((x, w))
    rows = x.reshape(-1, width)
    out = product(rows, w, jnp.dtype(out_dtype or x.dtype), precision)
    return out.reshape(*x.shape[:-1], -1)


def _forward(x: jax.Array, w: QuantizedArray, out_dtype: Any, precision: Any) -> jax.Array:
    k, k_padded = x.shape[-1], 2 * w.codes.shape[0]
    x = jnp.pad(x, ((0, 0), (0, k_padded - k))) if k != k_padded else x
    return reference.nf4_matmul(x, w.codes, w.absmax(), _table(w), out_dtype, precision)


def _transposed(g: jax.Array, w: QuantizedArray, out_dtype: Any, precision: Any) -> jax.Array:
    out = reference.nf4_matmul_transposed(g, w.codes, w.absmax(), _table(w), out_dtype, precision)
    return out[:, : math.prod(w.k_shape)]


def _table(w: QuantizedArray) -> jax.Array:
    return jnp.asarray(levels(w.codebook))


def _with_gradient(product: Any, backward: Any) -> Any:
    """A custom_vjp of `product` whose only cotangent is x's, computed by `backward`."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
    def call(x: jax.Array, w: QuantizedArray, out_dtype: Any, precision: Any) -> jax.Array:
        return product(x, w, out_dtype, precision)

    def fwd(x: jax.Array, w: QuantizedArray, out_dtype: Any, precision: Any) -> Any:
        return product(x, w, out_dtype, precision), (w, jnp.zeros((0,), x.dtype))

    def bwd(out_dtype: Any, precision: Any, residuals: Any, g: jax.Array) -> Any:
        w, like_x = residuals
        # In x's dtype: that of the forward product, so that bf16 training multiplies in bf16.
        return backward(g.astype(like_x.dtype), w, like_x.dtype, precision), None

    call.defvjp(fwd, bwd)
    return call


_matmul = _with_gradient(_forward, _transposed)
_matmul_transposed = _with_gradient(_transposed, _forward)
