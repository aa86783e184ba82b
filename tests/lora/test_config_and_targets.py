"""Which modules get an adapter, with which rank and scaling."""

import math

import jax
import pytest

import qlora_jax as qj
from qlora_jax.models import LlamaConfig, llama
from qlora_jax.quant import quantize_tree

LLAMA_7B = LlamaConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
)
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapters(config, params=None):
    """Abstract ones: no weight of the 7B model is ever made."""
    params = llama.abstract_params(LLAMA_7B) if params is None else params
    return jax.eval_shape(lambda key: qj.lora.init(key, params, config), jax.random.key(0))


def modules(found):
    return {path.split("/")[-2] for path in found}


def test_llama_7b_has_as_many_parameters_as_the_paper_says():
    config = qj.LoraConfig(rank=64, alpha=16)
    assert qj.lora.count(adapters(config)) == 159_907_840
    quantized = quantize_tree(llama.abstract_params(LLAMA_7B), qj.NF4())
    assert qj.lora.count(adapters(config, quantized)) == 159_907_840


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", LINEAR),
        (("q_proj", "v_proj"), {"q_proj", "v_proj"}),
        (("mlp.up_proj", "lm_head"), {"up_proj", "lm_head"}),
        (("embed_tokens",), {"embed_tokens"}),
        (r"layers\.mlp\..*", {"gate_proj", "up_proj", "down_proj"}),
        (r"[qk]_proj", {"q_proj", "k_proj"}),
        ("q_proj", {"q_proj"}),
    ],
)
def test_targets(targets, expected):
    assert modules(adapters(qj.LoraConfig(targets=targets))) == expected


@pytest.mark.parametrize("targets", [("q_proj", "query"), "query", ("proj",), r"q_pro"])
def test_a_target_that_matches_nothing_is_an_error_that_lists_the_modules(targets):
    with pytest.raises(qj.QloraError, match="matches no module.*layers.self_attn.q_proj"):
        adapters(qj.LoraConfig(targets=targets))


def test_modules_in_full():
    config = qj.LoraConfig(targets=("q_proj",), modules_to_save=("lm_head", "norm"))
    found = adapters(config)
    assert set(found) == {"layers/self_attn/q_proj/kernel", "lm_head/kernel", "norm/scale"}
    assert found["lm_head/kernel"].shape == (4096, 32000)
    with pytest.raises(qj.QloraError, match="both a target and in modules_to_save"):
        adapters(qj.LoraConfig(modules_to_save=("q_proj",)))
    with pytest.raises(qj.QloraError, match="matches no module"):
        adapters(qj.LoraConfig(modules_to_save=("head",)))
    with pytest.raises(qj.QloraError, match="nothing to train"):
        adapters(qj.LoraConfig(targets=()))
    quantized = quantize_tree(llama.abstract_params(LLAMA_7B), qj.NF4())
    with pytest.raises(qj.QloraError, match="trained in full but is quantized"):
        adapters(qj.LoraConfig(targets=("q_proj",), modules_to_save=("k_proj",)), quantized)


def test_patterns_and_scaling():
    config = qj.LoraConfig(
        rank=8,
        alpha=16,
        rank_pattern={"q_proj": 4, r"mlp\..*": 2, "up_proj": 32},
        alpha_pattern={r".*self_attn\.[kv]_proj": 5},
    )
    found = {path.split("/")[-2]: w for path, w in adapters(config).items()}
    ranks = {name: w.rank for name, w in found.items()}
    # The first pattern that matches counts: up_proj is below mlp.
    assert ranks == dict.fromkeys(LINEAR, 8) | {
        "q_proj": 4, "gate_proj": 2, "up_proj": 2, "down_proj": 2
    }  # fmt: skip
    assert found["k_proj"].scaling == 5 / 8
    assert found["q_proj"].scaling == 16 / 4
    rooted = adapters(qj.LoraConfig(rank=8, alpha=16, rslora=True))
    assert {w.scaling for w in rooted.values()} == {16 / math.sqrt(8)}


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"rank_pattern": {"x": -1}}, {"dropout": 1.0}, {"dropout": -0.1}]
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(qj.QloraError):
        qj.LoraConfig(**settings)
