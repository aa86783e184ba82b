"""config.json: entries of the wrong type are named, whatever reads them."""

import pytest

from qlora_jax import QloraError
from qlora_jax.models import LlamaConfig, read_config
from qlora_jax.models.typed import checked, entry, needed

PLAIN = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64', expected a whole number"),
        ({"intermediate_size": 12.5}, "intermediate_size is 12.5, expected a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected at least 1"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, expected at least 1"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings is 'x'"),
        ({"rms_norm_eps": "a"}, "rms_norm_eps is 'a', expected a finite number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
        ({"rope_theta": [1]}, r"rope_theta is \[1\], expected a finite number"),
        ({"rope_scaling": "abc"}, "rope_scaling is 'abc', expected an object"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "rope_scaling.factor is 'x'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": 1}},
            "rope_parameters.truncate is 1, expected true or false",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x', expected a whole number"),
        ({"eos_token_id": [1, None]}, "eos_token_id is None, expected a whole number"),
        ({"model_type": "qwen2", "layer_types": "full"}, "layer_types is 'full', expected a list"),
        ({"model_type": "mistral", "sliding_window": "x"}, "sliding_window is 'x'"),
        ({"vocab_size": None}, r"lacks \['vocab_size'\]"),
    ],
)
def test_entries_of_the_wrong_type(settings, message):
    with pytest.raises(QloraError, match=message):
        read_config(PLAIN | settings)


def test_whole_numbers_serve_as_floats_and_null_is_absent():
    config = LlamaConfig.from_hf(
        PLAIN | {"rope_theta": 10000, "rms_norm_eps": None, "rope_scaling": None}
    )
    assert (config.rope.theta, config.rms_norm_eps) == (10000.0, 1e-6)
    assert isinstance(config.rope.theta, float)
    assert entry({"a": None}, "a", int, 3) == 3
    assert checked("a", 2, float) == 2.0
    with pytest.raises(QloraError, match="a is missing; expected text"):
        needed({}, "a", str)


def test_a_scaling_that_was_added_to_a_file_of_transformers_5():
    """It counts, as for transformers; what it does not say is as it was."""
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope = LlamaConfig.from_hf(PLAIN | nested | {"rope_scaling": scaling}).rope
    assert (rope.kind, rope.factor, rope.theta) == ("yarn", 4.0, 5e5)
    assert LlamaConfig.from_hf(PLAIN | nested).rope.kind == "default"
    for settings, message in (
        (scaling | {"rope_theta": 1.0}, "theta .* is 1, which yarn cannot"),
        ({"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}, "low_freq"),
        ({"type": "llama3", "factor": 2, "low_freq_factor": 0, "high_freq_factor": 4}, "low_freq"),
    ):
        with pytest.raises(QloraError, match=message):
            LlamaConfig.from_hf(PLAIN | {"rope_scaling": settings})
