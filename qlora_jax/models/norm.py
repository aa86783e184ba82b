"""Normalization in fp32."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in fp32, returned as x's.

    from_one: the parameter is what the scale differs from one by.
    """

    def __init__(self, width: int, eps: float, *, from_one: bool = False) -> None:
        self.scale = nnx.Param(jnp.full((width,), 0.0 if from_one else 1.0, jnp.float32))
        self.eps = eps
        self.from_one = from_one

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> the same shape and dtype."""
        scale = self.scale[...]
        return _normalize(x, 1.0 + scale if self.from_one else scale, self.eps)


# Recomputed in the backward pass: otherwise several fp32 copies of x are kept per norm.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _normalize(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in fp32, as x's type."""

    def __init__(self, width: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> the same shape and dtype."""
        return _center(x, self.scale[...], self.bias[...], self.eps)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def _center(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    out = wide * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return out.astype(x.dtype)
