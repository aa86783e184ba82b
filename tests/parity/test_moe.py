"""Mixtral and Qwen3-MoE beside transformers, and their adapters beside PEFT."""

from typing import Any

import numpy as np
import pytest
import transformers

import qlora_jax as qj
from tests.parity.decoders import (
    SMALL,
    check_adapters,
    check_greedy,
    check_logits_and_gradients,
    check_own_loss,
    pair,
)

pytestmark = pytest.mark.standard_promotion

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (
        transformers.MixtralConfig,
        {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral, window": (
        transformers.MixtralConfig,
        {
            "intermediate_size": 80,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 8,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "router_jitter_noise": 0.1,  # there in training alone, here never
        },
    ),
    "mixtral, one expert": (
        transformers.MixtralConfig,
        {
            "intermediate_size": 64,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "rope_parameters": YARN,
        },
    ),
    "qwen3": (
        transformers.Qwen3MoeConfig,
        {
            "moe_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "head_dim": 32,
        },
    ),
    "qwen3, not renormalized": (
        transformers.Qwen3MoeConfig,
        {
            "moe_intermediate_size": 64,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3, window": (
        transformers.Qwen3MoeConfig,
        {
            "moe_intermediate_size": 32,
            "num_experts": 6,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "rope_parameters": YARN,
        },
    ),
    "qwen3, every other layer dense": (
        transformers.Qwen3MoeConfig,
        {
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
        },
    ),
    "qwen3, some layers dense": (
        transformers.Qwen3MoeConfig,
        {
            "moe_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "attention_bias": True,
            "num_hidden_layers": 8,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [0, 5],
            "use_sliding_window": True,
            "sliding_window": 8,
        },
    ),
}
FAMILIES = ("mixtral", "qwen3")
DENSE = ("qwen3, every other layer dense", "qwen3, some layers dense")


def peer_config(variant: str) -> Any:
    make, changes = VARIANTS[variant]
    return make(**(SMALL | changes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant, tmp_path):
    check_logits_and_gradients(pair(peer_config(variant), tmp_path / "base"), tmp_path)


@pytest.mark.parametrize("variant", ["mixtral, window", "qwen3", DENSE[0]])
def test_load_balancing_loss(variant, tmp_path):
    """Of all layers with experts together, without padding, and added to the mean of the tokens."""
    config = peer_config(variant)
    losses = {}
    for coefficient in (0.0, 0.5):
        config.output_router_logits, config.router_aux_loss_coef = True, coefficient
        folder = tmp_path / str(coefficient)
        losses[coefficient] = check_own_loss(pair(config, folder), folder)
    # Of k experts of a token it is k at least, up to a chance imbalance that is in one's favor.
    gain = np.subtract(losses[0.5], losses[0.0])
    assert np.all(gain > 0.45 * config.num_experts_per_tok)


@pytest.mark.parametrize("variant", [*FAMILIES, *DENSE])
def test_greedy(variant, tmp_path):
    check_greedy(pair(peer_config(variant), tmp_path))


# PEFT looks for its own pattern of a fused parameter among modules first.
@pytest.mark.filterwarnings("default:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("mixtral", qj.LoraConfig(rank=4, alpha=8)),
        # Twice the experts' rank is the usual one.
        ("qwen3", qj.LoraConfig(rank=4, alpha=8, rslora=True, rank_pattern={r"experts\..*": 2})),
        # Attention of both kinds of layers, of another rank in one. PEFT takes the names of an MLP
        # for those of experts.
        (
            DENSE[1],
            qj.LoraConfig(
                rank=4,
                targets=(
                    "q_proj",
                    "v_proj",
                    *(f"experts.{x}_proj" for x in ("gate", "up", "down")),
                ),
                rank_pattern={r"dense_layers\.self_attn\.q_proj": 2},
            ),
        ),
    ],
)
def test_adapters(variant, config, tmp_path):
    """Of every expert; PEFT reads an adapter for each, and writes one for all of a layer."""
    check_adapters(pair(peer_config(variant), tmp_path / "base").folder, tmp_path, config)
