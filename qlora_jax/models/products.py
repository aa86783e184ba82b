"""Products of dense fp32 weights, whose sums are added in pieces on a CPU."""

import functools
import itertools
import operator
from typing import Any

import jax
import jax.numpy as jnp

TERMS = 288
"""The most terms of a piece."""


def in_pieces(x: jax.Array, weight: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """`jax.lax.dot_general` as nnx.Linear calls it: x [..., K] times weight [K, N].

    XLA on a CPU adds 512 terms one after the other, in products of one row all K. Behind a large
    one, as attention sinks have, every small one is then rounded at the spacing of large numbers,
    which is where most of the rounding in fp32 logits comes from (docs/numbers.md). A dense fp32
    weight on a CPU is therefore multiplied in pieces of TERMS terms at most; anything else at once.
    """
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=dimension_numbers, **options)
    count = -(-weight.shape[0] // TERMS)
    if x.dtype != jnp.float32 or count == 1:
        return dot(x, weight)

    def pieces(x: jax.Array, weight: jax.Array) -> jax.Array:
        parts = zip(jnp.array_split(x, count, axis=-1), jnp.array_split(weight, count), strict=True)
        return functools.reduce(operator.add, itertools.starmap(dot, parts))

    return jax.lax.platform_dependent(x, weight, cpu=pieces, default=dot)
