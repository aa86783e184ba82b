"""Mixtral and Qwen3-MoE by themselves; that they are transformers' is shown in tests/parity."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import qlora_jax as qj
from qlora_jax import QloraError, models
from qlora_jax.checkpoints.names import parameters
from qlora_jax.models import read_config
from qlora_jax.models.stacks import patterns
from qlora_jax.quant import is_quantized
from tests.models import decoders

MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
}

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
SMALL = TINY | {
    "moe_intermediate_size": 16,
    "num_hidden_layers": 6,
    "head_dim": 8,
    "num_experts": 4,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [5, 9],
}
TURNS = QWEN3_30B_A3B | SMALL | {"num_hidden_layers": 4, "mlp_only_layers": []}


def four_bit(k: int, n: int) -> int:
    """Bytes of one [K, N] weight: codes, 8-bit scales, their own scales, their offset."""
    scales = k * n // 64
    return k * n // 2 + scales + 4 * math.ceil(scales / 256) + 4


def bytes_of(config: dict) -> tuple[int, int]:
    """(in 4 bits, in 16 and 32 bits) of the whole model, by hand."""
    d, layers, heads = config["hidden_size"], config["num_hidden_layers"], 32
    head = config.get("head_dim", d // heads)
    experts = config.get("num_experts", config.get("num_local_experts"))
    hidden = config.get("moe_intermediate_size", config["intermediate_size"])
    queries, keys = heads * head, config["num_key_value_heads"] * head
    attention = four_bit(d, queries) + 2 * four_bit(d, keys) + four_bit(queries, d)
    mlp = experts * (2 * four_bit(d, hidden) + four_bit(hidden, d))
    router = 2 * d * experts
    norms = 4 * (2 * d + (2 * head if config["model_type"] == "qwen3_moe" else 0))
    ends = 2 * 2 * config["vocab_size"] * d + 4 * d
    return layers * (attention + mlp), layers * (router + norms) + ends


@pytest.mark.parametrize(
    ("config", "gib", "trained"),
    [(MIXTRAL_8X7B, 22.8, 240_123_904), (QWEN3_30B_A3B, 15.5, 843_841_536)],
)
def test_published_models_in_four_bits(config, gib, trained):
    """Their experts are nearly all of them, and are quantized and adapted with the rest."""
    params = models.abstract_params(read_config(config), jnp.bfloat16)
    params = qj.quantize_tree(params, qj.NF4())
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    quantized = sum(leaf.nbytes for leaf in leaves if is_quantized(leaf))
    rest = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if not is_quantized(leaf))
    assert (quantized, rest) == bytes_of(config)
    assert (quantized + rest) / 2**30 == pytest.approx(gib, abs=0.05)
    adapters = jax.eval_shape(
        lambda key: qj.lora.init(key, params, qj.LoraConfig(rank=16)), jax.random.key(0)
    )
    assert qj.lora.count(adapters) == trained


@pytest.mark.parametrize("config", [MIXTRAL_8X7B, QWEN3_30B_A3B])
def test_a_configuration_survives_its_file(config):
    ours = read_config(config)
    assert read_config(ours.to_hf()) == ours
    changes = {"sliding_window": 8, "use_sliding_window": True, "output_router_logits": True}
    other = read_config(config | changes | {"router_aux_loss_coef": 0.02})
    assert other.sliding_window == 8 and other.router_aux_loss_coef == 0.02
    assert other.output_router_logits and read_config(other.to_hf()) == other


def test_layers_without_experts():
    """Those that are listed, and all but every other one; in files they have their own numbers."""
    config = read_config(QWEN3_30B_A3B | SMALL)
    assert config.dense_layers == (0, 2, 4, 5) and config.stacks["layers"] == [1, 3]
    assert read_config(config.to_hf()) == config
    table = {p.path: p for p in parameters(config)}
    up = table["dense_layers/mlp/up_proj/kernel"]
    numbers = [int(up.hf_name(i).split(".")[2]) for i in range(up.layers)]
    assert numbers == [0, 2, 4, 5] and up.shape == (4, 32, 48)
    experts = table["layers/mlp/experts/up_proj/kernel"]
    assert experts.hf_name(4) == "model.layers.3.mlp.experts.0.up_proj.weight"
    assert experts.at(4) == (1, 0)


def test_cache_and_packing_with_layers_of_two_kinds():
    decoders.check_cache_and_packing(read_config(TURNS))


@pytest.mark.slow
def test_lora_step_with_layers_of_two_kinds():
    """Their loss has the load of the experts too."""
    decoders.check_lora_step(read_config(TURNS | {"output_router_logits": True}))


def test_the_program_does_not_grow_with_layers_that_take_turns():
    def lines(layers: int, **changes: Any) -> int:
        hf = QWEN3_30B_A3B | {"decoder_sparse_step": 2, "num_hidden_layers": layers} | changes
        config = read_config(hf)
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        run = functools.partial(models.apply, config)
        return str(jax.make_jaxpr(run)(models.abstract_params(config), ids)).count("\n")

    assert lines(48) == lines(4)
    assert lines(40, decoder_sparse_step=1, mlp_only_layers=[0]) < 1.1 * lines(4)


def test_patterns_of_layers():
    def found(order: str) -> list[tuple[str, int]]:
        return [("".join(unit), times) for unit, times in patterns(list(order))]

    assert found("SSSS") == [("S", 4)]
    assert found("DSDSDS") == [("DS", 3)]
    assert found("DSSSS") == [("D", 1), ("S", 4)]
    assert found("DDSDDSSS") == [("DDS", 2), ("S", 2)]
    assert found("DS") == [("D", 1), ("S", 1)]


def test_padding_has_no_part_in_the_balance():
    changes = {"output_router_logits": True, "router_aux_loss_coef": 20.0}
    config = read_config(MIXTRAL_8X7B | TINY | changes)
    model = qj.Model(config, decoders.random_params(config), None, "", jnp.float32)
    ids = jax.random.randint(jax.random.key(1), (1, 17), 0, config.vocab_size)
    real = jnp.arange(17)[None] < 12

    def mean(ids: jax.Array, real: jax.Array) -> float:
        batch = {"input_ids": ids, "labels": jnp.where(real, ids, -100), "attention_mask": real}
        total, tokens = jax.jit(model.loss)(model.params, batch)
        return float(total / tokens)

    whole = mean(ids[:, :12], real[:, :12])
    assert mean(ids, real) == pytest.approx(whole, rel=1e-5)
    # Most of it is the balance: 20 times a number near k = 2.
    assert 35 < whole < 60


def test_every_expert_has_a_tensor_of_its_own_in_files():
    small = {"num_hidden_layers": 2, "vocab_size": 64}
    for config, last in (
        (MIXTRAL_8X7B, "model.layers.1.block_sparse_moe.experts.7.w2.weight"),
        (QWEN3_30B_A3B, "model.layers.1.mlp.experts.127.down_proj.weight"),
    ):
        table = {p.path: p for p in parameters(read_config(config | small))}
        down = table["layers/mlp/experts/down_proj/kernel"]
        experts = down.layers // 2
        assert down.hf_name(down.layers - 1) == last
        assert down.hf_name(0) == last.replace("s.1.", "s.0.").replace(f".{experts - 1}.", ".0.")
        assert down.file_shape == down.shape[:1:-1]


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (QWEN3_30B_A3B, {"decoder_sparse_step": 49}, "no layer has experts"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        (QWEN3_30B_A3B, {"mlp_only_layers": ["0"]}, "mlp_only_layers is '0'"),
        (QWEN3_30B_A3B, {"num_experts": None}, "lacks num_experts"),
        (QWEN3_30B_A3B, {"moe_intermediate_size": None}, r"lacks \['moe_intermediate_size'\]"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "there are 8 experts"),
        (MIXTRAL_8X7B, {"num_local_experts": 0}, "num_experts is 0, expected at least 1"),
        (MIXTRAL_8X7B, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_is_not_supported_is_refused(config, change, message):
    with pytest.raises(QloraError, match=message):
        read_config(config | change)
