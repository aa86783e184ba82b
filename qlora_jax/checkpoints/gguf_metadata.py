"""A configuration as GGUF's metadata: what `GGUFFile` reads, the other way round."""

import math
from typing import Any

import numpy as np

from qlora_jax.errors import QloraError
from qlora_jax.models import LlamaConfig, RopeConfig

# Mistral is to GGUF a Llama with a window.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# What of a rope scaling there are entries for.
_ROPE = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def describable(config: Any) -> LlamaConfig:
    """`config`; QloraError if GGUF cannot hold a model of it."""
    family = config.model_type
    if not isinstance(config, LlamaConfig) or family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise QloraError(f"a {family} model cannot be written as GGUF here; known: {known}")
    if config.sliding_window and family != "mistral":
        raise QloraError(
            f"a {family} model with a sliding window cannot be written as GGUF: the format does "
            "not say which layers have it"
        )
    return config


def add_config(writer: Any, config: LlamaConfig) -> None:
    """Everything but the tokens into a GGUFWriter."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    _add_rope_scaling(writer, config.rope)


def _add_rope_scaling(writer: Any, rope: RopeConfig) -> None:
    if rope.kind not in _ROPE:
        raise QloraError(f"rope scaling {rope.kind!r} cannot be written as GGUF")
    plain = RopeConfig(
        rope.kind, rope.theta, **{key: getattr(rope, key) for key in _ROPE[rope.kind]}
    )
    if rope != plain:
        raise QloraError(f"GGUF has no entries for all settings of this rope scaling: {rope}")
    if rope.kind in ("linear", "yarn"):
        writer.add_string(f"{writer.arch}.rope.scaling.type", rope.kind)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)


def rope_divisors(config: LlamaConfig) -> np.ndarray | None:
    """What Llama 3's scaling divides each frequency by, fp32 [Dh/2]; None for any other."""
    rope = config.rope
    if rope.kind != "llama3":
        return None
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor
    assert rope.original_max_position_embeddings
    frequencies = rope.theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 / ((1 - blend) / rope.factor + blend)).astype(np.float32)
