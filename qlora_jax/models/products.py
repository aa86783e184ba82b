"""Products of dense fp32 weights, whose sums are added in pieces on a CPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TERMS = 288
"""The most terms of a piece."""

_Dot = Callable[[jax.Array, jax.Array], jax.Array]


def in_pieces(x: jax.Array, weight: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """`jax.lax.dot_general` as nnx.Linear calls it: x [..., K] times weight [K, N].

    XLA on a CPU adds 512 terms one after the other, in products of one row all K. Behind a large
    one, as attention sinks have, every small one is then rounded at the spacing of large numbers,
    which is where most of the rounding in fp32 logits comes from (docs/numbers.md). A dense fp32
    weight on a CPU is therefore multiplied in pieces of TERMS terms at most; anything else at once,
    and so are gradients. Forward mode has no derivative.
    """
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=dimension_numbers, **options)
    if x.dtype != jnp.float32 or weight.shape[0] <= TERMS:
        return dot(x, weight)
    return _product(dot, x, weight)


# A rule of its own, since that of `platform_dependent` would keep what each branch needs.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dot: _Dot, x: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, weight, cpu=functools.partial(_add, dot), default=dot)


def _forward(dot: _Dot, x: jax.Array, weight: jax.Array) -> Any:
    return _product(dot, x, weight), (x, weight)


def _backward(dot: _Dot, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(dot, *kept)[1](g)


_product.defvjp(_forward, _backward)


def _add(dot: _Dot, x: jax.Array, weight: jax.Array) -> jax.Array:
    """In a loop: written out, the parts of all pieces would exist together, and take long to
    compile."""
    whole, rest = divmod(weight.shape[0], TERMS)
    start = rest or TERMS

    def add(i: Any, total: jax.Array) -> jax.Array:
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start + i * TERMS, slice_size=TERMS
        )
        return total + dot(part(x, axis=-1), part(weight, axis=0))

    first = dot(x[..., :start], weight[:start])
    return jax.lax.fori_loop(0, whole - (not rest), add, first)
