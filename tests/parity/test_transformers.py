"""The Llama family beside transformers, in every variant."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import qlora_jax as qj
from benchmarks import smollm2
from benchmarks.fp32_logits import TEXTS
from tests.parity.decoders import (
    SMALL,
    Batch,
    check_adapters,
    check_greedy,
    check_logits_and_gradients,
    logits,
    pair,
    peer_logits,
)

pytestmark = pytest.mark.standard_promotion

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama 1 and 2": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "llama 3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama, linear rope": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama, biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "smollm2": (transformers.LlamaConfig, {"tie_word_embeddings": True, "num_attention_heads": 4}),
    "mistral, window": (transformers.MistralConfig, {"sliding_window": 8}),
    "mistral, head_dim": (transformers.MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2.5, yarn": (transformers.Qwen2Config, {"rope_parameters": YARN}),
    "qwen2, windows above": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
}


def peer_config(variant: str) -> Any:
    make, changes = VARIANTS[variant]
    return make(**(SMALL | changes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant, tmp_path):
    check_logits_and_gradients(pair(peer_config(variant), tmp_path / "base"), tmp_path)


@pytest.mark.parametrize("variant", ["llama 3", "mistral, window", "qwen2, windows above", "qwen3"])
def test_greedy(variant, tmp_path):
    check_greedy(pair(peer_config(variant), tmp_path))


@pytest.mark.parametrize("variant", ["llama, biases", "mistral, window", "qwen3"])
def test_adapters(variant, tmp_path):
    check_adapters(pair(peer_config(variant), tmp_path / "base").folder, tmp_path)


@pytest.mark.slow
def test_smollm2(tmp_path):
    """The whole of SmolLM2-135M in fp32, and its tokenizer, from the same GGUF file."""
    file = Path(smollm2.gguf())
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = qj.load(file)
    for text in (TEXTS[0], *TEXTS[4:]):
        ids = np.asarray([model.tokenizer(text)["input_ids"]], np.int32)
        given = Batch(ids, np.ones_like(ids), ids)
        found, expected = logits(model, model.params, given), peer_logits(peer, given)
        print(f"{ids.size} tokens: largest difference {np.abs(found - expected).max():.2e}")
        # Without products in pieces the first of them misses it by a third (docs/numbers.md).
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    # In float64 too, the last of them; what is left is torch's own rounding.
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), model.params)
        exact = dataclasses.replace(model, params=params, dtype=jnp.float64)
        np.testing.assert_allclose(logits(exact, params, given), expected, rtol=0, atol=1e-4)
    # transformers' own conversion leaves out the cutting of digits; elsewhere it must agree.
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for plain in ("Hello world, naïve café ...", "def f(x):\n\treturn x", "  spaces   and 中文 😀"):
        assert model.tokenizer(plain)["input_ids"] == theirs(plain)["input_ids"], plain
    assert model.tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
