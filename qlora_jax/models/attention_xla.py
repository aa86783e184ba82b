"""Attention in JAX's own operations, in blocks of queries.

Without cuDNN `jax.nn.dot_product_attention` would make the scores of all queries by all keys at
once and keep the probabilities for the backward pass; here neither is ever whole.

Letters: B batch, T queries, S keys, H heads, N heads of keys, G = H / N, D size of a head.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.models.masks import Mask

BLOCK = 128
"""Queries that are attended together, where a sequence attends to itself."""
SPANS = 16
"""How many times that is written out, to keep programs small; beyond, blocks are looped over."""


class _How(NamedTuple):
    """What is known when tracing."""

    scale: float
    softcap: float | None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """As `attention.attend`; scores and softmax in fp32, which exist for BLOCK queries at a time.

    Where T = S no query sees a later key, so that queries are taken in spans, each over the keys up
    to its own end: that halves the work. For the backward pass q, k, v and each query's log-sum-exp
    of scores are kept, from which that makes the probabilities again (FlashAttention-2,
    https://arxiv.org/abs/2307.08691, section 2.3.2).
    """
    how = _How(q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    return _attention(how, q, k, v, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: _How, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    return _forward(how, q, k, v, mask)[0]


def _forward(how: _How, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> Any:
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def block(seen: int, _: None, first: Any, queries: jax.Array) -> Any:
        scores, visible = _scores(how, queries, keys[:, :, :seen], mask, first)
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _product("bngts,bnsd->bngtd", weights.astype(v.dtype), values[:, :, :seen])
        return None, ((out / total).astype(q.dtype), (top + jnp.log(total))[..., 0])

    spans = [
        _over_blocks(functools.partial(block, seen), None, first, end, _by_head(q, k))[1]
        for first, end, seen in _spans(q.shape[1], k.shape[1])
    ]
    out, log_sums = _joined(spans)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape), (q, k, v, mask, log_sums)


def _backward(how: _How, kept: Any, g: jax.Array) -> Any:
    q, k, v, mask, log_sums = kept
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def block(
        seen: int, carry: Any, first: Any, queries: jax.Array, log_sums: jax.Array, g: jax.Array
    ) -> Any:
        scores, visible = _scores(how, queries, keys[:, :, :seen], mask, first)
        weights = jnp.where(visible, jnp.exp(scores - log_sums[..., None]), 0.0)
        d_weights = _product("bngtd,bnsd->bngts", g, values[:, :, :seen])
        d_scores = weights * (d_weights - jnp.sum(weights * d_weights, axis=-1, keepdims=True))
        if how.softcap is not None:
            d_scores *= 1 - jnp.square(scores / how.softcap)
        d_scores = (how.scale * d_scores).astype(q.dtype)
        d_keys, d_values = carry
        d_keys = d_keys.at[:, :, :seen].add(_product("bngts,bngtd->bnsd", d_scores, queries))
        weights = weights.astype(g.dtype)
        d_values = d_values.at[:, :, :seen].add(_product("bngts,bngtd->bnsd", weights, g))
        d_queries = _product("bngts,bnsd->bngtd", d_scores, keys[:, :, :seen])
        return (d_keys, d_values), (d_queries.astype(q.dtype),)

    arrays = _by_head(q, k), log_sums, _by_head(g, k)
    carry: Any = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    spans = []
    for first, end, seen in _spans(q.shape[1], k.shape[1]):
        carry, found = _over_blocks(functools.partial(block, seen), carry, first, end, *arrays)
        spans.append(found)
    (d_queries,) = _joined(spans)
    d_keys, d_values = (x.swapaxes(1, 2).astype(k.dtype) for x in carry)
    return d_queries.transpose(0, 3, 1, 2, 4).reshape(q.shape), d_keys, d_values, None


_attention.defvjp(_forward, _backward)


def _spans(time: int, slots: int) -> Iterator[tuple[int, int, int]]:
    """(first query, end, keys that they see) of at most SPANS spans of whole blocks, and of what is
    left; of all queries at once where they are not the keys' own."""
    if time != slots:
        yield 0, time, slots
        return
    size = BLOCK * max(1, -(-time // (SPANS * BLOCK)))
    whole = time - time % BLOCK
    for start in range(0, whole, size):
        end = min(start + size, whole)
        yield start, end, end
    if whole < time:
        yield whole, time, time


def _over_blocks(
    step: Callable[..., tuple[Any, Any]], carry: Any, first: int, end: int, *arrays: jax.Array
) -> tuple[Any, Any]:
    """step(carry, first of a block, *its queries of the arrays) -> (carry, its part of the results)
    from block to block of a span; arrays and results [B, N, G, T, ...]."""
    if (end - first) % BLOCK or end - first == BLOCK:
        return step(carry, first, *(x[:, :, :, first:end] for x in arrays))

    def body(carry: Any, first: jax.Array) -> Any:
        cut = (jax.lax.dynamic_slice_in_dim(x, first, BLOCK, axis=3) for x in arrays)
        return step(carry, first, *cut)

    carry, found = jax.lax.scan(body, carry, jnp.arange(first, end, BLOCK))

    def whole(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], end - first, *x.shape[5:])

    return carry, jax.tree.map(whole, found)


def _scores(
    how: _How, queries: jax.Array, keys: jax.Array, mask: Mask, first: Any
) -> tuple[jax.Array, jax.Array]:
    """Scores [B, N, G, T, S] of queries `first` and on, and which of the keys they see."""
    scores = _product("bngtd,bnsd->bngts", queries, keys) * how.scale
    if how.softcap is not None:
        scores = how.softcap * jnp.tanh(scores / how.softcap)
    return scores, mask.dense(first, queries.shape[3], keys.shape[2])[:, :, None]


def _by_head(x: jax.Array, k: jax.Array) -> jax.Array:
    """[B, T, H, D] -> [B, N, G, T, D]."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3]).transpose(0, 2, 3, 1, 4)


def _joined(spans: list[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *spans)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
