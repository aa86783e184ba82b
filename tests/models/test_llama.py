"""The Llama family by itself; that its logits are transformers' is shown in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax import models
from qlora_jax.models import Cache, LlamaConfig, attention_xla

BASE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama": {"rope_theta": 5e5, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True, "eos_token_id": [1, 2]},
}


def config(family: str) -> LlamaConfig:
    return LlamaConfig.from_hf({"model_type": family, **BASE, **FAMILIES[family]})


def logits(config, params, ids, **options):
    """In one program: op by op, every operation would be compiled alone."""
    run = jax.jit(lambda params, ids, options: models.apply(config, params, ids, **options)[0])
    return run(params, ids, options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_survives_its_file(family):
    assert LlamaConfig.from_hf(config(family).to_hf()) == config(family)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_windows_and_blocks_against_one_mask(family, monkeypatch):
    """Every query of every layer attends to what the plain rule says, in blocks of any size."""
    full = config(family)
    params = models.init_params(full, jax.random.key(0))
    params = jax.tree.map(lambda x: 3 * x, params)
    ids = jax.random.randint(jax.random.key(1), (2, 20), 0, 50)
    whole = logits(full, params, ids)
    monkeypatch.setattr(attention_xla, "BLOCK", 4)
    np.testing.assert_allclose(logits(full, params, ids), whole, rtol=0, atol=2e-5)
    wide = logits(dataclasses.replace(full, sliding_window=20), params, ids)
    assert float(jnp.abs(wide - whole)[:, :5].max()) < 2e-5
    assert float(jnp.abs(wide - whole)[:, 5:].max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_documents_do_not_see_each_other(family):
    """Three documents in a row, and padding, give what each gives by itself."""
    full = config(family)
    params = jax.tree.map(lambda x: 3 * x, models.init_params(full, jax.random.key(0)))
    ids = jax.random.randint(jax.random.key(1), (1, 16), 0, 50)
    segments = jnp.asarray([[1] * 6 + [2] * 1 + [3] * 7 + [0] * 2])
    mask = segments > 0
    packed = logits(full, params, ids, segment_ids=segments, attention_mask=mask)
    apart = [logits(full, params, ids[:, a:b]) for a, b in ((0, 6), (6, 7), (7, 14))]
    np.testing.assert_allclose(packed[:, :14], jnp.concatenate(apart, axis=1), rtol=0, atol=2e-5)
    cache = Cache.create(full, 1, 16)
    with pytest.raises(ValueError, match="packed sequences have no cache"):
        models.apply(full, params, ids, segment_ids=segments, cache=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_the_cache_change_nothing(family):
    full = config(family)
    params = jax.tree.map(lambda x: 3 * x, models.init_params(full, jax.random.key(0)))
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
    plain = logits(full, params, ids)

    padded = jnp.pad(ids, [(0, 0), (4, 3)])
    mask = jnp.pad(jnp.ones_like(ids), [(0, 0), (4, 3)])
    found = logits(full, params, padded, attention_mask=mask)[:, 4:-3]
    np.testing.assert_allclose(found, plain, rtol=0, atol=2e-5)

    cache = Cache.create(full, 2, 20)
    step = jax.jit(lambda ids, cache: models.apply(full, params, ids, cache=cache))
    parts = []
    for start, stop in ((0, 7), (7, 8), (8, 12)):
        part, cache = step(ids[:, start:stop], cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), plain, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="20 slots, 12 in use: no room for 9"):
        models.apply(full, params, jnp.zeros((2, 9), jnp.int32), cache=cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_hidden_layers": None}, r"lacks \['num_hidden_layers'\]"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"'linear' lacks \['factor'\]"),
        ({"rope_scaling": {"rope_type": "llama3", "odd": 1}}, r"do not know: \['odd'\]"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(qj.QloraError, match=message):
        LlamaConfig.from_hf({"model_type": "llama", **BASE, **changes})
