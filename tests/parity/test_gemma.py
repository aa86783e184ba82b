"""Gemma 1, 2 and 3 beside transformers."""

from typing import Any

import pytest
import transformers

from tests.parity.decoders import (
    SMALL,
    check_adapters,
    check_greedy,
    check_logits_and_gradients,
    pair,
)

pytestmark = pytest.mark.standard_promotion

SIZES = SMALL | {"head_dim": 24}
SHORT = {"sliding_window": 8, "query_pre_attn_scalar": 40}
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma": (transformers.GemmaConfig, {"hidden_act": "gelu", "attention_bias": True}),
    "gemma2": (
        transformers.Gemma2Config,
        SHORT | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
    ),
    "gemma2, no caps, biases": (
        transformers.Gemma2Config,
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "layer_types": ["full_attention"] * 2 + ["sliding_attention"],
            "sliding_window": 100,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        SHORT
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "gemma3, as before": (
        transformers.Gemma3TextConfig,
        SHORT
        | {
            "sliding_window_pattern": 2,
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e3,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "final_logit_softcapping": 5.0,
            "attention_bias": True,
        },
    ),
}


def peer_config(variant: str) -> Any:
    make, changes = VARIANTS[variant]
    return make(**(SIZES | changes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant, tmp_path):
    check_logits_and_gradients(pair(peer_config(variant), tmp_path / "base"), tmp_path)


@pytest.mark.parametrize("variant", ["gemma2", "gemma3"])
def test_greedy(variant, tmp_path):
    check_greedy(pair(peer_config(variant), tmp_path))


@pytest.mark.parametrize("variant", ["gemma2", "gemma3"])
def test_adapters(variant, tmp_path):
    check_adapters(pair(peer_config(variant), tmp_path / "base").folder, tmp_path)
