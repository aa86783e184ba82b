"""Cross-entropy of tokens, in chunks: logits of [B, T, V] never exist."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.errors import QloraError

IGNORE = -100
"""Label of a position that does not count (the convention of PyTorch and Hugging Face)."""

CHUNK = 256
"""Rows of logits that exist at a time: enough to keep a matrix unit busy, at V = 128k 128 MiB."""
TRAVELLING = 2**14
"""The most rows of hidden states, of all devices, that come together at the head at a time."""

Head = Callable[[Any, jax.Array], jax.Array]


def causal_lm_loss(
    head: Head,
    head_params: Any,
    hidden: jax.Array,
    labels: jax.Array,
    *,
    chunk: int = CHUNK,
    parts: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """As `token_loss`, where position t of hidden [B, T, D] predicts labels[:, t + 1].

    Raises QloraError for labels of another shape, and for T = 1, where no position has a next
    token.
    """
    _check(hidden, labels)
    if labels.shape[1] < 2:
        raise QloraError(
            f"labels {labels.shape} have nothing to predict: a sequence needs at least two tokens"
        )
    hidden, labels = hidden[:, :-1], labels[:, 1:]
    return token_loss(head, head_params, hidden, labels, chunk=chunk, parts=parts)


def token_loss(
    head: Head,
    head_params: Any,
    hidden: jax.Array,
    labels: jax.Array,
    *,
    chunk: int = CHUNK,
    parts: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses of all labelled tokens, and how many there are: two fp32 scalars.

    head         head(head_params, hidden [M, D]) -> logits [M, V]
    head_params  pytree; a gradient is computed for those leaves only that are differentiated
    hidden       [B, T, D]; position t predicts labels[:, t]
    labels       [B, T] int; IGNORE where there is nothing to learn
    parts        into how many parts B is split over a mesh, each of which is gone through apart

    Only labelled positions are multiplied by the head: they are brought to the front, and as many
    chunks are computed as they fill. The gradient is taken chunk by chunk in the forward pass, so
    that no chunk's logits are kept or computed again. Log-sum-exp in fp32. Raises QloraError for
    labels of another shape.
    """
    _check(hidden, labels)
    parts = parts if hidden.shape[0] % parts == 0 else 1
    rows = hidden.reshape(parts, -1, hidden.shape[-1])
    targets = labels.reshape(parts, -1)
    chunk = min(chunk, max(TRAVELLING // parts, 1), targets.shape[1])
    counted = targets != IGNORE
    order = jnp.argsort(~counted, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, -order.shape[1] % chunk)), mode="edge")
    counts = jnp.sum(counted, axis=1, dtype=jnp.int32)
    rows, targets = _taken(rows, order), _taken(jnp.where(counted, targets, 0), order)
    total = _sum_over_chunks(head, head_params, rows, targets, counts, chunk)
    return total, jnp.sum(counts).astype(jnp.float32)


@jax.vmap
def _taken(x: jax.Array, order: jax.Array) -> jax.Array:
    return x.at[order].get(mode="promise_in_bounds")


def need_labels(batch: Any) -> None:
    """Raises QloraError for a batch without input_ids or labels, or with position_ids, which mark
    documents in batches made for transformers."""
    if missing := {"input_ids", "labels"} - set(batch):
        raise QloraError(f"a batch needs {sorted(missing)}; it has {sorted(batch)}")
    if batch.get("position_ids") is not None:
        raise QloraError(
            "a batch has position_ids, which the loss does not read; give segment_ids [B, T], "
            "which number the documents of a row"
        )


def _check(hidden: jax.Array, labels: jax.Array) -> None:
    if labels.shape != hidden.shape[:-1] or labels.ndim != 2:
        raise QloraError(
            f"hidden states [B, T, D] are {hidden.shape}, so labels [B, T] must be "
            f"{hidden.shape[:-1]}, not {labels.shape}"
        )


def _sum_over_chunks(
    head: Head, params: Any, rows: jax.Array, targets: jax.Array, counts: jax.Array, chunk: int
) -> jax.Array:
    """rows [P, M, D] and targets [P, M], of which the first counts[p] of part p matter.

    `chunk` rows of every part at a time, so that each device brings its own; it divides M.
    """
    chunks = (jnp.max(counts) + chunk - 1) // chunk

    def chunk_at(i: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        start = i * chunk
        live = start + jnp.arange(chunk) < counts[:, None]
        cut = [jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (rows, targets)]
        return cut[0].reshape(-1, rows.shape[-1]), cut[1].reshape(-1), live.reshape(-1)

    @jax.custom_vjp
    def total(params: Any, rows: jax.Array) -> jax.Array:
        def body(i: jax.Array, total: jax.Array) -> jax.Array:
            h, target, live = chunk_at(i, rows)
            losses, _ = _token_losses(head(params, h), target)
            return total + jnp.sum(jnp.where(live, losses, 0.0))

        return jax.lax.fori_loop(0, chunks, body, jnp.zeros((), jnp.float32))

    def forward(params: Any, rows: Any) -> tuple[jax.Array, Any]:
        leaves, tree = jax.tree.flatten(params)
        values = [leaf.value for leaf in leaves]
        learned = [i for i, leaf in enumerate(leaves) if leaf.perturbed]
        rows = rows.value

        def logits_of(learned_values: list[jax.Array], h: jax.Array) -> jax.Array:
            filled = list(values)
            for i, value in zip(learned, learned_values, strict=True):
                filled[i] = value
            return head(jax.tree.unflatten(tree, filled), h)

        def body(i: jax.Array, carry: Any) -> Any:
            total, d_params, d_rows = carry
            h, target, live = chunk_at(i, rows)
            logits, pull = jax.vjp(logits_of, [values[i] for i in learned], h)
            losses, d_logits = _token_losses(logits, target)
            d_learned, d_h = pull(jnp.where(live[:, None], d_logits, 0.0).astype(logits.dtype))
            return (
                total + jnp.sum(jnp.where(live, losses, 0.0)),
                [a + b.astype(jnp.float32) for a, b in zip(d_params, d_learned, strict=True)],
                jax.lax.dynamic_update_slice_in_dim(
                    d_rows, d_h.reshape(len(counts), chunk, -1), i * chunk, axis=1
                ),
            )

        start = (
            jnp.zeros((), jnp.float32),
            [jnp.zeros(values[i].shape, jnp.float32) for i in learned],
            jnp.zeros_like(rows),
        )
        total, d_params, d_rows = jax.lax.fori_loop(0, chunks, body, start)
        filled: list[Any] = [None] * len(values)
        for i, d in zip(learned, d_params, strict=True):
            filled[i] = d.astype(values[i].dtype)
        return total, (jax.tree.unflatten(tree, filled), d_rows)

    def backward(gradients: Any, g: jax.Array) -> Any:
        return jax.tree.map(lambda d: d * g.astype(d.dtype), gradients)

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(params, rows)


def _token_losses(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """logits [M, V], target [M] -> losses [M] and their gradient by the logits [M, V], in fp32."""
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    at_target = jnp.take_along_axis(logits, target[:, None], axis=-1, mode="promise_in_bounds")
    losses = (jnp.log(total) + top - at_target)[:, 0]
    is_target = jnp.arange(logits.shape[-1]) == target[:, None]
    return losses, weights / total - is_target.astype(jnp.float32)
