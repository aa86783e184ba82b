"""Gemma by itself."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import qlora_jax as qj
from qlora_jax import QloraError
from qlora_jax.checkpoints.names import parameters
from qlora_jax.models import read_config
from qlora_jax.models.config import FULL, SLIDING
from tests.models import decoders

BASE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
CONFIGS = {
    "gemma": BASE | {"model_type": "gemma"},
    "gemma2": BASE | {"model_type": "gemma2", "attn_logit_softcapping": 2.0},
    "gemma3_text": BASE | {"model_type": "gemma3_text", "rope_scaling": LINEAR},
}


@pytest.mark.parametrize("family", CONFIGS)
def test_config(family):
    decoders.check_config(CONFIGS[family])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_cache_and_packing(family):
    decoders.check_cache_and_packing(read_config(CONFIGS[family]))


def test_lora_step():
    decoders.check_lora_step(read_config(CONFIGS["gemma2"]))


@pytest.mark.parametrize("begin", ["model.language_model.", "language_model.model."])
def test_the_text_model_of_a_gemma_that_sees(begin, tmp_path, caplog):
    """Its names begin otherwise in files, and the vision tower beside it is left out."""
    text = CONFIGS["gemma3_text"]
    config = read_config(text)
    rng = np.random.default_rng(0)
    tensors = {"model.vision_tower.patch.weight": np.ones((2, 2), np.float32)}
    alone = {}
    for parameter in parameters(config):
        for layer in range(parameter.layers):
            name = parameter.hf_name(layer)
            alone[name] = rng.normal(size=parameter.file_shape).astype(np.float32)
            tensors[begin + name.removeprefix("model.")] = alone[name]
    whole = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 6]}
    for folder, about, content in (("seeing", whole, tensors), ("text", text, alone)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(about))
        save_file(content, tmp_path / folder / "model.safetensors")
    model = qj.load(tmp_path / "seeing")
    assert "a gemma3, of which the text model is read, a gemma3_text" in caplog.text
    assert model.config == dataclasses.replace(config, eos_token_id=(1, 6))
    same = jax.tree.map(np.array_equal, model.params, qj.load(tmp_path / "text").params)
    assert jax.tree.all(same)


def test_what_the_files_of_gemma_3_leave_out():
    """As published: most entries are missing, and the rotary ones are spread."""
    config = read_config(
        {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "rope_scaling": LINEAR,
            "sliding_window": 1024,
        }
    )
    assert (config.vocab_size, config.num_attention_heads, config.head_dim) == (262208, 8, 256)
    assert (config.num_key_value_heads, config.max_position_embeddings) == (4, 131072)
    assert config.layer_types == ((SLIDING,) * 5 + (FULL,)) * 5 + (SLIDING,) * 4
    assert (config.rope.kind, config.rope.theta, config.rope.factor) == ("linear", 1e6, 8.0)
    assert config.local_rope is not None
    assert (config.local_rope.kind, config.local_rope.theta) == ("default", 1e4)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (None, None)
    assert config.tie_word_embeddings and config.query_pre_attn_scalar == 256


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0.0"),
        ("gemma2", {"sliding_window": None}, "sliding_window is not set"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "x"}}, r"\['rope_type'\], expected full"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma3_text", {"head_dim": 15}, "head_dim 15 is odd"),
    ],
)
def test_what_is_refused(family, changes, message):
    with pytest.raises(QloraError, match=message):
        read_config(CONFIGS[family] | changes)


def test_bytes_of_gemma_2_9b():
    size = decoders.bytes_in_4bit(
        {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
        }
    )
    linear = 42 * (2 * 3584 * 4096 + 2 * 3584 * 2048 + 3 * 3584 * 14336)
    # Codes; a byte for every 64; 4 bytes for every 256 of those, and for every kernel.
    four_bit = linear // 2 + linear // 64 + 4 * linear // 64 // 256 + 4 * 7 * 42
    norms = 4 * 3584 * (4 * 42 + 1)
    assert size == four_bit + 2 * 256000 * 3584 + norms
