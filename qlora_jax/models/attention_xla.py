"""Attention in JAX's own operations, in blocks of queries."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from qlora_jax.models.dot_product import dot_product_attention
from qlora_jax.models.masks import Mask, cut

BLOCK = 128
"""Queries that are attended together, where a sequence attends to itself."""
SPANS = 16
"""How many times that is written out, to keep programs small; beyond, blocks are looped over."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """As `attention.attend`; probabilities exist for BLOCK queries at a time.

    Where T = S no query sees a later key, so that queries are taken in spans, each over the keys up
    to its own end: that halves the work.
    """
    time, slots = q.shape[1], k.shape[1]
    if time != slots:
        return _attend_span(q, k, v, mask, 0, time, slots, scale, softcap)
    parts = [
        _attend_span(q, k, v, mask, start, end, end, scale, softcap) for start, end in _spans(time)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _spans(time: int) -> Iterator[tuple[int, int]]:
    """(start, end) of at most SPANS spans of whole blocks, and of what is left."""
    size = BLOCK * max(1, -(-time // (SPANS * BLOCK)))
    whole = time - time % BLOCK
    for start in range(0, whole, size):
        yield start, min(start + size, whole)
    if whole < time:
        yield whole, time


# Under jax.checkpoint only q, k and v are kept for the backward pass: the T x S probabilities of
# every layer would be by far the largest residual, and computing them again is cheap. Blocks are
# cut inside, so that they keep the whole arrays together and not a slice each.
# prevent_cse=False: the layers run inside a scan, whose forward and backward loops are separate.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(4, 5, 6, 7, 8))
def _attend_span(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    start: int,
    end: int,
    seen: int,
    scale: float | None,
    softcap: float | None,
) -> jax.Array:
    """Queries `start` to `end` over the first `seen` keys."""
    k, v = k[:, :seen], v[:, :seen]

    def block(first: int | jax.Array, count: int) -> jax.Array:
        here, part = mask.dense(first, count, seen), cut(q, first, count)
        return dot_product_attention(part, k, v, mask=here, scale=scale, softcap=softcap)

    if (end - start) % BLOCK or end - start == BLOCK:
        return block(start, end - start)
    # Checkpointed once more, or the loop would keep every block's probabilities.
    step = jax.checkpoint(functools.partial(block, count=BLOCK), prevent_cse=False)
    parts = jax.lax.map(step, jnp.arange(start, end, BLOCK))
    return jnp.moveaxis(parts, 0, 1).reshape(q.shape[0], end - start, *q.shape[2:])
