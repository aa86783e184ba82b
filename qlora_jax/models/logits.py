"""The products that make logits, with a gradient that costs no more than they do."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def logits(hidden: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """hidden [..., D] times a dense weight [D, V] (axis 0) or [V, D] (axis 1) -> fp32 [..., V].

    The gradient is multiplied in hidden's dtype, as those of 4-bit weights and of all other layers
    are. JAX's own rule would multiply in that of the logits, fp32: by its maker's figures at half
    the 16-bit rate of an Ampere or Hopper GPU (as TF32), at an eighth of a T4's.
    """
    return _dot(hidden, weight, axis, jnp.float32)


def _forward(hidden: jax.Array, weight: jax.Array, axis: int) -> Any:
    return _dot(hidden, weight, axis, jnp.float32), (hidden, weight)


def _backward(axis: int, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden, weight = kept
    g = g.astype(hidden.dtype)
    rows, wide = hidden.reshape(-1, hidden.shape[-1]), g.reshape(-1, g.shape[-1])
    first, second = (rows, wide) if axis == 0 else (wide, rows)
    d_weight = jnp.dot(first.T, second, preferred_element_type=jnp.float32)
    return _dot(g, weight, 1 - axis, hidden.dtype), d_weight.astype(weight.dtype)


logits.defvjp(_forward, _backward)


def table_logits(hidden: jax.Array, table: jax.Array, *, dense: bool = False) -> jax.Array:
    """hidden [..., D] times an embedding table [V, D], transposed -> fp32 [..., V].

    dense: the table is known to be an array, neither in 4 bits nor with an adapter, so that
    `logits` computes them.
    """
    if dense:
        return logits(hidden, table, 1)
    table = table.astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def _dot(x: jax.Array, weight: jax.Array, axis: int, dtype: Any) -> jax.Array:
    contracted = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, weight.astype(x.dtype), contracted, preferred_element_type=dtype)
