"""Losses of what a whole row is labelled with: a class, numbers, labels each true or false."""

import jax
import jax.numpy as jnp

from qlora_jax.errors import QloraError

REGRESSION, SINGLE_LABEL = "regression", "single_label_classification"
MULTI_LABEL, SOFT_LABELS = "multi_label_classification", "soft_labels"
PROBLEMS = (REGRESSION, SINGLE_LABEL, MULTI_LABEL)
"""What config.json may name; `SOFT_LABELS` is DeBERTa's own, and never named."""


def classification_loss(
    logits: jax.Array, labels: jax.Array, problem: str
) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses, and how many they are: fp32 scalars; their ratio is transformers' loss.

    logits [B, C], fp32; what labels are, and what is counted, by `problem`:

    regression                  numbers [B, C], or [B] where C = 1; squared errors, B x C of them
    single_label_classification classes [B]; cross-entropies, one for each that is not negative
    multi_label_classification  [B, C], from 0 (false) to 1 (true); binary cross-entropies, B x C
    soft_labels                 probabilities [B, C]; cross-entropies, B of them

    Raises QloraError for labels of another shape.
    """
    shape = (logits.shape[0], 1 if problem == SINGLE_LABEL else logits.shape[1])
    rows = labels.reshape(*labels.shape[:1], -1)
    if rows.shape != shape:
        raise QloraError(
            f"logits are {logits.shape}, so the labels of a {problem} must be {shape}, not "
            f"{labels.shape}"
        )
    if problem == SINGLE_LABEL:
        return _classes(logits, rows)
    rows = rows.astype(jnp.float32)
    if problem == REGRESSION:
        losses = jnp.square(logits - rows)
    elif problem == MULTI_LABEL:
        losses = jax.nn.softplus(logits) - logits * rows
    else:
        losses = -jnp.sum(jax.nn.log_softmax(logits) * rows, axis=-1)
    return jnp.sum(losses), jnp.asarray(losses.size, jnp.float32)


def _classes(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropies of classes [B, 1]."""
    counted = labels >= 0
    # A class that does not exist gives NaN: inside jit it cannot be told in words.
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits), jnp.maximum(labels, 0), axis=-1, mode="fill"
    )
    return -jnp.sum(jnp.where(counted, chosen, 0.0)), jnp.sum(counted, dtype=jnp.float32)
