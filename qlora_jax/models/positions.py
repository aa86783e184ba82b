"""Positions of tokens, counted by sequence or by document."""

import jax
import jax.numpy as jnp


def count_positions(
    real: jax.Array | None, segments: jax.Array | None, batch: int, time: int
) -> jax.Array:
    """[B, T]: counts real tokens only, so that left padding does not shift a sequence.

    Every segment counts from zero.
    """
    if real is None:
        counted = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
    else:
        counted = jnp.maximum(jnp.cumsum(real.astype(jnp.int32), axis=1) - 1, 0)
    if segments is None:
        return counted
    before = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    starts = jnp.where((segments != before).at[:, 0].set(True), counted, 0)
    return counted - jax.lax.cummax(starts, axis=1)
