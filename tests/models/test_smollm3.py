"""SmolLM3 by itself; that its logits are transformers' is shown in tests/parity."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax import models
from qlora_jax.models import Cache, SmolLM3Config

BASE: dict[str, Any] = {
    "model_type": "smollm3",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"no_rope_layers": [0, 1, 1, 0], "attention_bias": True, "mlp_bias": True},
        {"use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": False},
    ],
)
def test_a_configuration_survives_its_file(changes):
    config = SmolLM3Config.from_hf(BASE | changes)
    assert SmolLM3Config.from_hf(config.to_hf()) == config


def test_which_layers_are_rotated_and_which_have_windows():
    config = SmolLM3Config.from_hf(BASE | {"no_rope_layer_interval": 2, "sliding_window": 5})
    assert config.no_rope_layers == (1, 0, 1, 0)
    assert (config.sliding_window, set(config.layer_types)) == (None, {"full_attention"})
    config = SmolLM3Config.from_hf(BASE | {"use_sliding_window": True, "sliding_window": 5})
    assert config.no_rope_layers == (1, 1, 1, 0)
    assert config.layer_types == ("full_attention",) * 3 + ("sliding_attention",)
    assert (config.tie_word_embeddings, config.rope.theta) == (True, 2e6)


def test_layers_without_positions_and_the_cache():
    """Without rotation anywhere, positions change nothing; a cache never does."""
    config = SmolLM3Config.from_hf(BASE)
    none = dataclasses.replace(config, no_rope_layers=(0, 0, 0, 0))
    params = jax.tree.map(lambda x: 3 * x, models.init_params(config, jax.random.key(0)))
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
    stretched = 3 * jnp.broadcast_to(jnp.arange(12), (2, 12))
    run = jax.jit(models.apply, static_argnums=0)
    for changed, moves in ((none, False), (config, True)):
        plain = run(changed, params, ids)[0]
        apart = run(changed, params, ids, positions=stretched)[0]
        assert (float(jnp.abs(apart - plain).max()) > 1e-3) == moves
    first, cache = run(config, params, ids[:, :7], cache=Cache.create(config, 2, 12))
    rest, _ = run(config, params, ids[:, 7:], cache=cache)
    both = jnp.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(both, plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_rope_layers": [1, 1]}, r"no_rope_layers is \[1, 1\], expected 0 or 1 for each of 4"),
        ({"no_rope_layers": [1, 2, 0, 1]}, "expected 0 or 1 for each of 4 layers"),
        ({"no_rope_layers": [1, "1", 0, 1]}, "no_rope_layers is '1', expected a whole number"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0, expected at least 1"),
        ({"num_hidden_layers": None}, r"lacks \['num_hidden_layers'\]"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "rope scaling 'longrope' is not supported",
        ),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(qj.QloraError, match=message):
        models.read_config(BASE | changes)


def test_the_size_of_smollm3_3b():
    """HuggingFaceTB/SmolLM3-3B in NF4 with double-quantized scales, the rest in bf16."""
    config = SmolLM3Config.from_hf(
        {
            "model_type": "smollm3",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
        }
    )
    abstract = models.abstract_params(config, jnp.bfloat16)
    tree = qj.quantize_tree(abstract, qj.NF4())
    weights = 36 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 11008)
    # Half a byte a weight, a byte a block of 64, 4 bytes 256 blocks and 4 bytes a kernel and layer.
    quantized = weights // 2 + weights // 64 + weights // (64 * 256) * 4 + 7 * 36 * 4
    vocabulary, norms = 128256 * 2048, (2 * 36 + 1) * 2048
    leaves = jax.tree.leaves(tree)
    assert sum(x.size * x.dtype.itemsize for x in leaves) == quantized + 2 * vocabulary + 4 * norms
    assert sum(x.size for x in jax.tree.leaves(abstract)) == 3_075_098_624
