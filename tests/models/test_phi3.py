"""Phi-3 by itself; that its logits are transformers' is shown in tests/parity."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax import models
from qlora_jax.generation import Sampling, generate
from qlora_jax.models import Phi3Config
from qlora_jax.models.rope import rotate, rotation

LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 5.0, 9.0]}
BASE: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LONG = {
    **BASE,
    "original_max_position_embeddings": 10,
    "partial_rotary_factor": 0.75,
    "rope_scaling": LONGROPE,
}


def model(hf: dict[str, Any]) -> qj.Model:
    config = Phi3Config.from_hf(hf)
    params = jax.tree.map(lambda x: 3 * x, models.init_params(config, jax.random.key(0)))
    return qj.Model(config, params, None, "random", jnp.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 7, "eos_token_id": [1, 2], "pad_token_id": 0},
        {"rope_theta": 250000.0, "tie_word_embeddings": True},
        LONG,
        LONG | {"rope_scaling": LONGROPE | {"attention_factor": 1.5, "factor": 3.0}},
    ],
)
def test_a_configuration_survives_its_file(changes):
    config = Phi3Config.from_hf(BASE | changes)
    assert Phi3Config.from_hf(config.to_hf()) == config


def test_longrope_as_the_files_have_it():
    """transformers 4 refuses a scaling with more than its three settings."""
    config = Phi3Config.from_hf(LONG | {"rope_scaling": LONGROPE | {"type": "su"}})
    assert config.to_hf()["rope_scaling"] == LONGROPE
    assert (config.rope.factor, config.changes_at) == (6.4, 10)
    assert Phi3Config.from_hf(BASE).changes_at is None


def test_only_the_first_part_of_a_head_is_rotated():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    rope = Phi3Config.from_hf(BASE | {"partial_rotary_factor": 0.5}).rope
    cos_sin = jax.jit(lambda at: rotation(rope, rope.rotated(8), 64, at))
    turned = jax.jit(rotate)(x, *cos_sin(jnp.arange(5)[None]))
    # Of each head, as complex numbers: entries 0 and 2, and 1 and 3.
    wide = np.asarray(x)
    pairs = wide[..., :2] + 1j * wide[..., 2:4]
    angles = np.arange(5)[:, None] * np.array([1.0, 10000**-0.5])
    pairs = pairs * np.exp(1j * angles)[:, None]
    expected = np.concatenate([pairs.real, pairs.imag, wide[..., 4:]], axis=-1)
    np.testing.assert_allclose(turned, expected, rtol=0, atol=1e-5)


def test_generation_computes_again_where_the_factors_change():
    """The same tokens as without a cache, whichever way the length 10 is reached and passed."""
    long = model(LONG)
    logits = jax.jit(lambda ids, mask: long.apply(long.params, ids, attention_mask=mask)[0][:, -1])
    prompts = [[3, 41, 7, 12, 30, 9, 28], [5, 6]]
    # The padding is on the left, so that the last position counts the real tokens.
    rows = [[0] * (24 - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (24 - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    for _ in range(12):
        new = np.argmax(logits(jnp.asarray([row[-24:] for row in rows]), jnp.asarray(mask)), axis=1)
        rows = [[*row, int(token)] for row, token in zip(rows, new, strict=True)]
        mask = [[*row[1:], 1] for row in mask]
    wanted = [row[24:] for row in rows]
    for count in (4, 5, 12):
        found = generate(long, prompts, Sampling(max_new_tokens=count), stop=())
        assert found == [row[:count] for row in wanted]
    came: list[np.ndarray] = []
    how = Sampling(max_new_tokens=12)
    generate(long, prompts, how, stop=(), on_tokens=came.append)
    assert np.concatenate(came, axis=1).tolist() == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear' is not supported in phi3"),
        ({"rope_scaling": {"type": "longrope"}}, r"lacks \['short_factor', 'long_factor'\]"),
        (
            LONG | {"partial_rotary_factor": 1.0},
            "short_factor has 3 entries, expected one for each of 4 pairs",
        ),
        (
            LONG | {"rope_scaling": LONGROPE | {"long_factor": [1, "x", 2]}},
            "rope_scaling.long_factor is 'x', expected a finite number",
        ),
        (LONG | {"original_max_position_embeddings": 1}, "is 1, expected at least 2"),
        ({"partial_rotary_factor": 0.4}, "0.4 of a head_dim of 8 is 3; rotary embedding needs"),
        ({"partial_rotary_factor": 1.5}, "1.5 of a head_dim of 8 is 12; rotary embedding needs"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"intermediate_size": None}, r"a phi3 model lacks \['intermediate_size'\]"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(qj.QloraError, match=message):
        models.read_config(BASE | changes)


def test_the_size_of_phi_3_mini():
    """microsoft/Phi-3-mini-4k-instruct in NF4 with double-quantized scales, the rest in bf16."""
    config = Phi3Config.from_hf(
        {
            "model_type": "phi3",
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        }
    )
    abstract = models.abstract_params(config, jnp.bfloat16)
    tree = qj.quantize_tree(abstract, qj.NF4())
    weights = 32 * (3072 * 9216 + 3072 * 3072 + 3072 * 16384 + 8192 * 3072)
    # Half a byte a weight, a byte a block of 64, 4 bytes 256 blocks and 4 bytes a kernel and layer.
    quantized = weights // 2 + weights // 64 + weights // (64 * 256) * 4 + 4 * 32 * 4
    vocabulary, norms = 2 * 32064 * 3072, (2 * 32 + 1) * 3072
    leaves = jax.tree.leaves(tree)
    assert sum(x.size * x.dtype.itemsize for x in leaves) == quantized + 2 * vocabulary + 4 * norms
    dense = sum(x.size for x in jax.tree.leaves(abstract))
    assert dense == weights + vocabulary + norms == 3_821_079_552
