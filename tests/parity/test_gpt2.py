"""GPT-2 beside transformers, and its adapters beside PEFT's."""

import json
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import qlora_jax as qj
from tests.parity.decoders import (
    batch,
    check_adapters,
    check_greedy,
    check_logits_and_gradients,
    logits,
    pair,
    peer_logits,
)

pytestmark = pytest.mark.standard_promotion

SIZES = {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "scaled by layer": {
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "activation_function": "gelu",
        "n_inner": 96,
    },
    "unscaled, untied": {
        "scale_attn_weights": False,
        "activation_function": "relu",
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 1e-2,
    },
}


def peer_config(variant: str) -> Any:
    # The usual end token lies outside of so small a vocabulary.
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    return transformers.GPT2Config(**SIZES, **ends, **VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant, tmp_path):
    check_logits_and_gradients(pair(peer_config(variant), tmp_path / "base"), tmp_path)


def test_greedy(tmp_path):
    check_greedy(pair(peer_config("scaled by layer"), tmp_path))


# Both c_proj, that of the MLP alone, and parts that are no Conv1D.
CONFIGS = {
    "gpt2": qj.LoraConfig(rank=4, alpha=8),
    "scaled by layer": qj.LoraConfig(
        rank=4,
        alpha=8,
        targets=("c_attn", "mlp.c_proj"),
        modules_to_save=("ln_2", "embed_positions"),
    ),
}


@pytest.mark.parametrize("variant", CONFIGS)
def test_adapters(variant, tmp_path):
    folder = pair(peer_config(variant), tmp_path / "base").folder
    check_adapters(folder, tmp_path, CONFIGS[variant])
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["fan_in_fan_out"] is True


def test_files_of_the_model_without_its_head(tmp_path):
    """As the first ones published are: bare names, and every layer's causal mask."""
    both = pair(peer_config("gpt2"), tmp_path / "base")
    both.peer.transformer.save_pretrained(tmp_path / "bare")
    file = tmp_path / "bare" / "model.safetensors"
    tensors = load_file(file)
    assert "h.0.ln_1.weight" in tensors
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 128, 128), np.float32)) for i in range(3)}
    masks["h.0.attn.masked_bias"] = np.asarray(-1e4, np.float32)
    save_file(tensors | masks, file)
    model, given = qj.load(tmp_path / "bare"), batch("left")
    difference = logits(model, model.params, given) - peer_logits(both.peer, given)
    assert np.abs(difference[given.real]).max() < 1e-4
    save_file(
        tensors | {"h.0.attn.odd": masks["h.0.attn.bias"]}, tmp_path / "bare" / "model.safetensors"
    )
    with pytest.raises(qj.QloraError, match=r"h\.0\.attn\.odd: surplus"):
        qj.load(tmp_path / "bare")
