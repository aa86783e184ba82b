"""Root-mean-square normalization in fp32."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in fp32, returned as x's."""

    def __init__(self, width: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> the same shape and dtype."""
        return _normalize(x, self.scale[...], self.eps)


# Recomputed in the backward pass: otherwise several fp32 copies of x are kept per norm.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _normalize(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)
