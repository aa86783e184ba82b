"""What a T5 is made of, read from (and written to) Hugging Face's config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import QloraError
from qlora_jax.models.config import check_positive, required, special_tokens, special_tokens_to_hf
from qlora_jax.models.typed import entry

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """An encoder-decoder of the T5 family. Field names are those of config.json.

    dense_act_fn           "relu", "gelu" (by erf), "gelu_new" (by tanh) or "silu"
    is_gated_act           the feed-forward is wo(act(wi_0(x)) * wi_1(x)), not wo(act(wi(x)))
    tie_word_embeddings    the output head is the embedding table
    scale_decoder_outputs  hidden states times d_model**-0.5 before the head: T5 v1.0
    """

    model_type: str = "t5"
    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dense_act_fn: str = "relu"
    is_gated_act: bool = False
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    decoder_start_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = (1,)
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers")
        check_positive(self, (*sizes, "num_heads"))
        if self.dense_act_fn not in ACTIVATIONS:
            raise QloraError(
                f"dense_act_fn {self.dense_act_fn!r} is not supported; known: {ACTIVATIONS}"
            )
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        # The encoder halves them twice: for the two directions, and for near and far.
        if buckets < 4:
            raise QloraError(f"relative_attention_num_buckets is {buckets}, expected at least 4")
        if distance <= buckets // 2:
            raise QloraError(
                f"relative_attention_max_distance is {distance}, expected more than "
                f"{buckets // 2}, half of relative_attention_num_buckets"
            )
        for name in ("decoder_start_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise QloraError(
                    f"{name} is {getattr(self, name)}, outside the vocabulary of {self.vocab_size}"
                )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "T5Config":
        """Reads a config.json; what it lacks is as in transformers' T5Config.

        The decoder starts from the padding token unless decoder_start_token_id says otherwise.
        Raises QloraError for a switch that is not supported.
        """
        sizes = required(hf, "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        activation, gated = _feed_forward(hf)
        tied = entry(hf, "tie_word_embeddings", bool, True)
        tokens = special_tokens({"eos_token_id": 1, **hf})
        if tokens["pad_token_id"] is None:
            tokens["pad_token_id"] = 0
        return cls(
            **sizes,
            num_decoder_layers=entry(hf, "num_decoder_layers", int, sizes["num_layers"]),
            relative_attention_num_buckets=entry(hf, "relative_attention_num_buckets", int, 32),
            relative_attention_max_distance=entry(hf, "relative_attention_max_distance", int, 128),
            layer_norm_epsilon=entry(hf, "layer_norm_epsilon", float, 1e-6),
            dense_act_fn=entry(hf, "dense_act_fn", str, activation),
            is_gated_act=entry(hf, "is_gated_act", bool, gated),
            tie_word_embeddings=tied,
            # Until transformers 5 the one switch stood for both: v1.0 ties and scales.
            scale_decoder_outputs=entry(hf, "scale_decoder_outputs", bool, tied),
            decoder_start_token_id=entry(hf, "decoder_start_token_id", int, tokens["pad_token_id"]),
            **tokens,
        )

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers (4 and 5) reads back to the same model."""
        # The name "gated-gelu" has always meant the tanh form, which has a name of its own too.
        activation = self.dense_act_fn
        if self.is_gated_act:
            activation = f"gated-{activation.removesuffix('_new')}"
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": self.model_type,
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "d_kv": self.d_kv,
            "d_ff": self.d_ff,
            "num_layers": self.num_layers,
            "num_decoder_layers": self.num_decoder_layers,
            "num_heads": self.num_heads,
            "relative_attention_num_buckets": self.relative_attention_num_buckets,
            "relative_attention_max_distance": self.relative_attention_max_distance,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "feed_forward_proj": activation,
            "dense_act_fn": self.dense_act_fn,
            "is_gated_act": self.is_gated_act,
            "tie_word_embeddings": self.tie_word_embeddings,
            "scale_decoder_outputs": self.scale_decoder_outputs,
            "decoder_start_token_id": self.decoder_start_token_id,
            **special_tokens_to_hf(self),
        }


def _feed_forward(hf: Mapping[str, Any]) -> tuple[str, bool]:
    """The activation, and whether it is gated, that feed_forward_proj says."""
    name = entry(hf, "feed_forward_proj", str, "relu")
    kind, _, activation = name.rpartition("-")
    if kind not in ("", "gated"):
        raise QloraError(
            f"feed_forward_proj {name!r} is not supported; expected ACTIVATION or gated-ACTIVATION"
        )
    if name == "gated-gelu":
        activation = "gelu_new"
    return activation, kind == "gated"
