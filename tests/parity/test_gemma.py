"""Gemma 1, 2 and 3 beside transformers."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

import qlora_jax as qj
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


def test_gemma_3_with_a_vision_tower(tmp_path):
    """Saved by transformers as a whole, its text model is read here."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=peer_config("gemma3").to_dict(), vision_config=vision, mm_tokens_per_image=1
    )
    peer = transformers.Gemma3ForConditionalGeneration(config).eval()
    peer.save_pretrained(tmp_path)
    model = qj.load(tmp_path)
    ids = np.random.default_rng(0).integers(3, 90, (2, 20))
    with torch.no_grad():
        expected = peer(input_ids=torch.from_numpy(ids)).logits.numpy()
    found = jax.jit(model.apply)(model.params, ids.astype(np.int32))[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["gemma2", "gemma3"])
def test_greedy(variant, tmp_path):
    check_greedy(pair(peer_config(variant), tmp_path))


@pytest.mark.parametrize("variant", ["gemma2", "gemma3"])
def test_adapters(variant, tmp_path):
    check_adapters(pair(peer_config(variant), tmp_path / "base").folder, tmp_path)
