"""Phi-3 to Phi-4-mini beside transformers and PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Phi3Config

from qlora_jax.generation import Sampling, generate
from tests.parity import decoders

pytestmark = [
    pytest.mark.standard_promotion,
    # transformers advises to write down a factor, which Phi-3's files lack.
    pytest.mark.filterwarnings("default:.*original_max_position_embeddings"),
]


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    """Factors that differ from pair to pair and between short and long texts."""
    draw = np.random.default_rng(0)
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": (1 + draw.random(pairs)).tolist(),
        "long_factor": (2 + 4 * draw.random(pairs)).tolist(),
        **more,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "phi-3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0},
        "sliding_window": 8,
        "num_key_value_heads": 4,
    },
    # Of the batches that are compared, the packed ones have no document longer than this.
    "phi-3.5": {"rope_parameters": longrope(8), "original_max_position_embeddings": 24},
    "phi-4-mini": {
        "rope_parameters": longrope(6, partial_rotary_factor=0.75, attention_factor=1.3),
        "original_max_position_embeddings": 4,
        "sliding_window": 100,
        "tie_word_embeddings": True,
    },
}


def config(variant: str) -> Phi3Config:
    return Phi3Config(pad_token_id=0, **(decoders.SMALL | VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant: str, tmp_path: Path) -> None:
    both = decoders.pair(config(variant), tmp_path / "model")
    decoders.check_logits_and_gradients(both, tmp_path)


def test_greedy_generation(tmp_path: Path) -> None:
    decoders.check_greedy(decoders.pair(config("phi-3"), tmp_path))


def test_generation_past_the_trained_context(tmp_path: Path) -> None:
    """Where the factors change with the longest row, what is cached is computed again."""
    both = decoders.pair(config("phi-3.5"), tmp_path)
    both.peer.generation_config.eos_token_id = None
    draw = np.random.default_rng(1)
    prompts = [draw.integers(3, 96, size).tolist() for size in (16, 5)]
    ours = generate(both.model, prompts, Sampling(max_new_tokens=64), stop=())
    padded = [[0] * (16 - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (16 - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    theirs = both.peer.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=64,
    )
    assert ours == theirs[:, 16:].tolist()


def test_adapters(tmp_path: Path) -> None:
    both = decoders.pair(config("phi-4-mini"), tmp_path / "model")
    decoders.check_adapters(both.folder, tmp_path)
