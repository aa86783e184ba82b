"""What stands on an encoder: the head that predicts masked words, poolers and classifiers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.models.encoder import linear
from qlora_jax.models.encoder_config import ACTIVATIONS, EncoderConfig
from qlora_jax.models.logits import table_logits
from qlora_jax.models.norm import LayerNorm


class MaskedLMHead(nnx.Module):
    """LayerNorm(act(dense(x))) times the embedding table, plus a bias of its own.

    width: of the table, which dense projects to.
    """

    def __init__(self, config: EncoderConfig, width: int, act: str, **options: Any) -> None:
        self.act = ACTIVATIONS[act]
        self.dense = linear(config, config.hidden_size, width, **options)
        self.LayerNorm = LayerNorm(width, config.layer_norm_eps)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), options["param_dtype"]))

    def __call__(self, hidden: jax.Array, table: jax.Array, *, dense: bool = False) -> jax.Array:
        """hidden [..., D], table [V, width] -> fp32 [..., V]; dense: as for `table_logits`."""
        x = self.LayerNorm(self.act(self.dense(hidden)))
        return table_logits(x, table, dense=dense) + self.bias[...].astype(jnp.float32)


class Pooler(nnx.Module):
    """act(dense(x)) of a row's first token."""

    def __init__(self, config: EncoderConfig, act: str, **options: Any) -> None:
        self.act = ACTIVATIONS[act]
        self.dense = linear(config, config.hidden_size, config.hidden_size, **options)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, T, D] -> [B, D]."""
        return self.act(self.dense(hidden[:, 0]))


def classifier(config: EncoderConfig, **options: Any) -> nnx.Linear:
    """[B, D] -> one logit for each label; in fp32, which costs nothing at this size."""
    options["dtype"] = jnp.float32
    return linear(config, config.hidden_size, len(config.labels), **options)
