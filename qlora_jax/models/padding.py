"""Padding, put where causal attention does not look."""

from typing import Any

import jax
import jax.numpy as jnp


def to_the_right(attention_mask: jax.Array, arrays: Any) -> Any:
    """A pytree of arrays [B, T] with each row's padding, on either side, moved behind its tokens.

    attention_mask [B, T] is zero on padding. No token sees a later one, so that attention needs no
    mask of such rows, with which its kernels are slower.
    """
    time = attention_mask.shape[1]
    first = jnp.argmax(attention_mask.astype(bool), axis=1)
    place = (jnp.arange(time) + first[:, None]) % time
    return jax.tree.map(lambda x: jnp.take_along_axis(x, place, axis=1), arrays)
