"""SmolLM3 beside transformers and PEFT."""

from pathlib import Path
from typing import Any

import pytest
from transformers import SmolLM3Config

from tests.parity import decoders

pytestmark = pytest.mark.standard_promotion

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 4},
    "windows and biases": {
        "no_rope_layers": [0, 1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "all rotated, windows elsewhere": {
        "no_rope_layers": [1, 1, 1],
        "rope_parameters": YARN,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
}


def config(variant: str) -> SmolLM3Config:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return SmolLM3Config(**(decoders.SMALL | tokens | VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant: str, tmp_path: Path) -> None:
    both = decoders.pair(config(variant), tmp_path / "model")
    decoders.check_logits_and_gradients(both, tmp_path)


def test_greedy_generation(tmp_path: Path) -> None:
    decoders.check_greedy(decoders.pair(config("windows and biases"), tmp_path))


def test_adapters(tmp_path: Path) -> None:
    both = decoders.pair(config("smollm3"), tmp_path / "model")
    decoders.check_adapters(both.folder, tmp_path)
