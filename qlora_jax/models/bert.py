"""BERT and RoBERTa, which differ in how positions are counted and in their heads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
from qlora_jax.models.encoder import Embeddings, Stack, attend, check_length, linear, visible
from qlora_jax.models.encoder_config import (
    CLASSIFICATION,
    MASKED_LM,
    EncoderConfig,
    read_common,
    write_common,
)
from qlora_jax.models.heads import MaskedLMHead, Pooler, classifier
from qlora_jax.models.positions import count_positions
from qlora_jax.models.remat import Remat, named

BERT, ROBERTA = "bert", "roberta"
_ARCHITECTURE = {BERT: "Bert", ROBERTA: "Roberta"}

NAMES = {
    "embeddings": "bert.embeddings",
    "encoder/layer": "bert.encoder.layer.{}",
    "pooler": "bert.pooler",
    "lm_head": "cls.predictions",
    "lm_head/dense": "cls.predictions.transform.dense",
    "lm_head/LayerNorm": "cls.predictions.transform.LayerNorm",
    "classifier": "classifier",
}
"""BERT: our module -> Hugging Face's, {} being the layer; what is inside has the same names."""

ROBERTA_NAMES = {
    "embeddings": "roberta.embeddings",
    "encoder/layer": "roberta.encoder.layer.{}",
    "lm_head": "lm_head",
    "lm_head/LayerNorm": "lm_head.layer_norm",
    "classifier": "classifier",
}
"""The same of RoBERTa."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """BERT or RoBERTa, by `model_type`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.type_vocab_size < 1:
            raise QloraError(f"type_vocab_size is {self.type_vocab_size}, expected at least 1")
        if self.model_type == ROBERTA and self.pad_token_id is None:
            raise QloraError("pad_token_id is missing; RoBERTa counts its positions from there")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "BertConfig":
        """Reads a config.json. Raises QloraError for a switch that is not supported."""
        usual: dict[str, Any] = {"pad_token_id": 0}
        if hf["model_type"] == ROBERTA:
            usual = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": (2,)}
        return cls(**read_common(hf, **usual))

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers reads back to the same model."""
        return write_common(self, _ARCHITECTURE[self.model_type])

    @property
    def first_position(self) -> int:
        """Where positions are counted from: RoBERTa's tables leave out those up to its padding."""
        if self.model_type == BERT:
            return 0
        assert self.pad_token_id is not None
        return self.pad_token_id + 1


class SelfAttention(nnx.Module):
    """query, key and value projections around attention of every token to every other."""

    def __init__(self, config: EncoderConfig, **options: Any) -> None:
        width = config.hidden_size
        self.head_dim = config.head_dim
        self.query = linear(config, width, width, **options)
        self.key = linear(config, width, width, **options)
        self.value = linear(config, width, width, **options)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """x [B, T, D], mask [B, 1, 1 or T, T] -> [B, T, D]."""
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (project(x).reshape(split) for project in (self.query, self.key, self.value))
        return attend(named("query", q), named("key", k), named("value", v), mask)


class RobertaClassifier(nnx.Module):
    """out_proj(tanh(dense(x))) of a row's first token."""

    def __init__(self, config: EncoderConfig, **options: Any) -> None:
        self.dense = linear(config, config.hidden_size, config.hidden_size, **options)
        self.out_proj = classifier(config, **options)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, T, D] -> one fp32 logit for each label [B, C]."""
        return self.out_proj(jnp.tanh(self.dense(hidden[:, 0])))


class Bert(nnx.Module):
    """The whole encoder and its head."""

    def __init__(
        self,
        config: BertConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.embeddings = Embeddings(config, config.hidden_size, True, **options)
        self.encoder = Stack(config, SelfAttention, **options)
        if config.head == MASKED_LM:
            act = config.hidden_act if config.model_type == BERT else "gelu"
            self.lm_head = MaskedLMHead(config, config.hidden_size, act, **options)
        if config.head == CLASSIFICATION and config.model_type == ROBERTA:
            self.classifier: Any = RobertaClassifier(config, **options)
        elif config.head == CLASSIFICATION:
            self.pooler = Pooler(config, "tanh", **options)
            self.classifier = classifier(config, **options)

    def hidden(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        remat: Remat = "none",
    ) -> jax.Array:
        """Hidden states [B, T, D] after the last layer; see `EncoderModel.hidden`."""
        config, first = self.config, self.config.first_position
        check_length(input_ids.shape[1], config.max_position_embeddings - first)
        if positions is not None:
            positions = positions + first
        elif config.model_type == BERT:
            positions = count_positions(None, segment_ids, *input_ids.shape)
        else:
            # As transformers does, by the padding token and not by the mask.
            real = input_ids != config.pad_token_id
            counted = count_positions(real, segment_ids, *input_ids.shape)
            positions = jnp.where(real, counted + first, first - 1)
        x = self.embeddings(input_ids, positions, token_type_ids)
        return self.encoder(x, visible(attention_mask, segment_ids), remat=remat)

    def head(self, hidden: jax.Array, *, dense: bool = False) -> jax.Array:
        """hidden [B, T, D] -> fp32 logits: of words [B, T, V], or of a row's labels [B, C].

        dense: the table of words is known to be, as for `table_logits`.
        """
        if self.config.head == MASKED_LM:
            table = self.embeddings.word_embeddings.embedding[...]
            return self.lm_head(hidden, table, dense=dense)
        if self.config.model_type == BERT:
            hidden = self.pooler(hidden)
        return self.classifier(hidden)
