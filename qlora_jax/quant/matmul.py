"""x @ W and g @ W^T with W in 4 bits; the gradient flows to x only, W being frozen."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.errors import QloraError
from qlora_jax.quant.array import QuantizedArray
from qlora_jax.quant.config import levels
from qlora_jax.quant.implementations import Implementation, product
from qlora_jax.quant.placement import placed
from qlora_jax.quant.varying import vary_alike


def nf4_matmul(
    x: jax.Array,
    w: QuantizedArray,
    *,
    out_dtype: Any = None,
    precision: Any = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """x [..., K] @ W [K, N] -> [..., N] of `out_dtype` (x's by default), accumulated in fp32.

    The backward product g @ W^T decodes the same 4-bit weight again: no dense W is kept between
    the passes. W must have no leading axes; jax.vmap over it where it has. precision: as in
    jax.lax.dot_general. implementation: the kernels of the platform by default (qj.backends() says
    which there are); one that is named and cannot run raises QloraError.
    """
    how = _How(jnp.dtype(out_dtype or x.dtype), precision, implementation)
    return _apply(_matmul, x, w, how, math.prod(w.k_shape))


def nf4_matmul_transposed(
    g: jax.Array,
    w: QuantizedArray,
    *,
    out_dtype: Any = None,
    precision: Any = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """g [..., N] @ W^T [N, K] -> [..., K] of `out_dtype` (g's by default), accumulated in fp32."""
    how = _How(jnp.dtype(out_dtype or g.dtype), precision, implementation)
    return _apply(_matmul_transposed, g, w, how, math.prod(w.n_shape))


class _How(NamedTuple):
    out_dtype: Any
    precision: Any
    implementation: Implementation | None


def _apply(call: Any, x: jax.Array, w: QuantizedArray, how: _How, width: int) -> jax.Array:
    if w.batch_shape:
        raise ValueError(f"expected one weight, got {w.batch_shape} stacked; use jax.vmap")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise QloraError(
            f"x [..., {width}] of {x.dtype} times a 4-bit weight would be rounded to that: "
            "give x in a floating type, as x.astype(jnp.float32)"
        )
    if x.shape[-1] != width:
        raise ValueError(f"x [..., {x.shape[-1]}] does not fit {w}: its last axis must be {width}")
    x, w = vary_alike((x, w))
    *lead, _ = x.shape
    # Sizes that are spelled out, since reshape cannot infer one of an empty array.
    out = call(x.reshape(math.prod(lead), width), w, how)
    return out.reshape(*lead, out.shape[-1])


def _forward(x: jax.Array, w: QuantizedArray, how: _How) -> jax.Array:
    k, k_padded = x.shape[-1], 2 * w.codes.shape[0]
    x = jnp.pad(x, ((0, 0), (0, k_padded - k))) if k != k_padded else x
    return _product(x, w, how, transposed=False)


def _transposed(g: jax.Array, w: QuantizedArray, how: _How) -> jax.Array:
    return _product(g, w, how, transposed=True)[:, : math.prod(w.k_shape)]


def _product(x: jax.Array, w: QuantizedArray, how: _How, *, transposed: bool) -> jax.Array:
    weight = (w.codes, w.scales, jnp.asarray(levels(w.codebook)), *w.nested_scales())
    run = functools.partial(product, how.implementation)
    if w.placement is not None:
        run = placed(run, w.placement)
    return run(x, weight, transposed, out_dtype=how.out_dtype, precision=how.precision)


def _with_gradient(call: Any, backward: Any) -> Any:
    """A custom_vjp of `call` whose only cotangent is x's, computed by `backward`."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def run(x: jax.Array, w: QuantizedArray, how: _How) -> jax.Array:
        return call(x, w, how)

    def fwd(x: jax.Array, w: QuantizedArray, how: _How) -> Any:
        return call(x, w, how), (w, jnp.zeros((0,), x.dtype))

    def bwd(how: _How, residuals: Any, g: jax.Array) -> Any:
        w, like_x = residuals
        # In x's dtype: that of the forward product, so that bf16 training multiplies in bf16.
        dtype = like_x.dtype
        return backward(g.astype(dtype), w, how._replace(out_dtype=dtype)), None

    run.defvjp(fwd, bwd)
    return run


_matmul = _with_gradient(_forward, _transposed)
_matmul_transposed = _with_gradient(_transposed, _forward)
