"""What the rules make of parameters, by name and shape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import qlora_jax as qj
from qlora_jax.lora.tree import named_leaves
from qlora_jax.models import abstract_params, read_config
from qlora_jax.parallel import Layout, make_mesh
from tests.models import test_encoders, test_gpt2

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 96,
    "d_model": 256,
    "d_kv": 64,
    "d_ff": 512,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "relu",
}


def placed(hf: dict[str, Any], mesh: str = "data=2,fsdp=2,tensor=2") -> tuple[Layout, Any]:
    config = read_config(hf)
    layout = Layout.of(make_mesh(mesh), config)
    return layout, layout.params(qj.quantize_tree(abstract_params(config), qj.NF4()))


def spec(leaf: Any) -> P:
    return (leaf.codes if isinstance(leaf, qj.QuantizedArray) else leaf).sharding.spec


def test_parameters_of_a_llama() -> None:
    _, params = placed(LLAMA)
    columns, rows = P(None, ("fsdp",), ("tensor",)), P(None, ("tensor",), ("fsdp",))
    expected = {
        "layers/self_attn/q_proj/kernel": columns,
        "layers/self_attn/o_proj/kernel": rows,
        "layers/mlp/up_proj/kernel": columns,
        "layers/mlp/down_proj/kernel": rows,
        "embed_tokens/embedding": P(None, ("fsdp", "tensor")),
        "lm_head/kernel": P(None, ("fsdp", "tensor")),
    }
    leaves = named_leaves(params)
    assert leaves["norm/scale"].sharding.is_fully_replicated
    assert {path: spec(leaves[path]) for path in expected} == expected
    for leaf in leaves.values():
        if isinstance(leaf, qj.QuantizedArray):
            assert leaf.codes.sharding == leaf.scales.sharding
            assert leaf.nested.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("hf", "narrowing"),
    [
        (LLAMA, ("o_proj", "down_proj")),
        (test_gpt2.PLAIN | {"n_embd": 256, "n_inner": 512}, ("c_proj",)),
        (T5, ("o", "wo")),
        (test_encoders.ROBERTA | {"hidden_size": 256, "intermediate_size": 512}, ("dense",)),
    ],
)
def test_every_layer_of_a_family_is_split(hf: dict[str, Any], narrowing: tuple[str, ...]) -> None:
    """Into as many parts as fsdp and tensor make, and along K over tensor what narrows."""
    _, params = placed(hf)
    for path, leaf in named_leaves(params).items():
        if isinstance(leaf, qj.QuantizedArray):
            parts = leaf.codes.sharding.shard_shape(leaf.codes.shape)
            assert leaf.codes.size == 4 * jax.numpy.prod(jax.numpy.array(parts)), path
            module = path.split("/")[-2]
            narrows = module in narrowing and "intermediate" not in path
            assert leaf.placement.k == (("tensor",) if narrows else ("fsdp",)), path


def test_what_no_axis_divides() -> None:
    """K of one block: N takes what K cannot, and what is gathered comes last."""
    _, params = placed(LLAMA | {"hidden_size": 64}, "fsdp=4,tensor=2")
    for name in ("q_proj", "o_proj"):
        placement = params["layers"]["self_attn"][name]["kernel"].placement
        assert (placement.k, placement.n) == ((), ("tensor", "fsdp"))
    _, params = placed(LLAMA | {"vocab_size": 97}, "fsdp=8")
    assert spec(params["lm_head"]["kernel"]) == P(None, None)


def test_adapters_and_optimizer_state() -> None:
    layout, params = placed(LLAMA)
    import optax

    config = qj.LoraConfig(rank=4, targets=("up_proj",), modules_to_save=("lm_head",))
    state = jax.eval_shape(
        lambda: qj.TrainState.create(
            qj.lora.init(jax.random.key(0), params, config), optax.adamw(1e-3)
        )
    )
    shardings = layout.state_shardings(state)
    for tree in (shardings.adapters, shardings.opt_state[0].mu, shardings.opt_state[0].nu):
        up = tree["layers/mlp/up_proj/kernel"]
        assert up.a.spec == P(None, ("fsdp", "tensor"), None)
        assert up.b.spec == P(None, None, ("fsdp", "tensor"))
        assert tree["lm_head/kernel"].spec == P(None, ("fsdp", "tensor"))
    assert shardings.opt_state[0].count.spec == shardings.step.spec == P()


@pytest.mark.slow
def test_moments_of_8_bits_are_split_by_blocks() -> None:
    layout, params = placed(LLAMA)
    config = qj.LoraConfig(rank=64, targets=("up_proj",))
    adapters = qj.lora.init(jax.random.key(0), params, config)
    gradients = jax.tree.map(lambda x: 0.1 + jnp.abs(x), adapters)
    optimizer = qj.adamw8bit(1e-2)
    state = qj.TrainState.create(adapters, optimizer)
    shardings = layout.state_shardings(state)
    moment = shardings.opt_state[0].mu["layers/mlp/up_proj/kernel"].a
    assert moment.codes.spec == P(None, ("fsdp", "tensor"), None)
    assert moment.absmax.spec == P(None, ("fsdp", "tensor"))
    expected, after = optimizer.update(gradients, state.opt_state, adapters)
    there = layout.state(state)
    split = (shardings.adapters, shardings.opt_state)
    update = jax.jit(optimizer.update, out_shardings=split)
    updates, moved = update(jax.device_put(gradients, split[0]), there.opt_state, there.adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), expected, updates)
    jax.tree.map(np.testing.assert_array_equal, moved[0].mu, after[0].mu)
