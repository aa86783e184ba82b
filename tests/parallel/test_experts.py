"""A mixture of experts on a mesh: every expert is split like any other weight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as qj
from qlora_jax.models import init_params, read_config

pytestmark = [
    pytest.mark.standard_promotion,  # optax.adamw
    pytest.mark.slow,
]


def test_losses_are_those_of_one_device() -> None:
    config = read_config(
        {
            "model_type": "mixtral",
            "vocab_size": 96,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        }
    )
    params = qj.quantize_tree(init_params(config, jax.random.key(1)), qj.NF4())
    model = qj.Model(config, params, None, "random", jnp.float32)
    ids = np.random.default_rng(0).integers(0, 96, (8, 10)).astype(np.int32)
    batch = {"input_ids": ids, "labels": ids}
    optimizer = optax.adamw(1e-2)

    def start():
        adapters = qj.lora.init(jax.random.key(0), params, qj.LoraConfig(rank=4))
        return qj.TrainState.create(adapters, optimizer)

    def losses(state, params, batch, shardings):
        step = qj.make_train_step(model.loss, optimizer, state_shardings=shardings)
        for _ in range(3):
            state, metrics = step(state, params, batch)
            yield float(metrics["loss"])

    layout = qj.Layout.of(qj.make_mesh("data=2,fsdp=2,tensor=2"), config)
    placed, split = layout.state(start()), layout.params(params)
    codes = split["layers"]["mlp"]["experts"]["down_proj"]["kernel"].codes
    assert codes.addressable_shards[0].data.size * 4 == codes.size
    shardings = layout.state_shardings(placed)
    found = list(losses(placed, split, layout.batch(batch), shardings))
    expected = list(losses(start(), params, batch, None))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
