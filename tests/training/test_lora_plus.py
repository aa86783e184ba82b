"""LoRA+: which arrays take the higher rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as qj
from qlora_jax.lora import LoraWeights, VeraWeights
from qlora_jax.training.lora_plus import adapter_labels
from qlora_jax.training.settings import TrainSettings

ONE = jnp.ones(3)
ADAPTERS = {
    "up/kernel": LoraWeights(ONE, ONE, 2.0, ONE, None),
    "embed/embedding": LoraWeights(ONE, ONE, 2.0),
    "down/kernel": VeraWeights(ONE, ONE),
    "head/kernel": ONE,
    "norm/scale": ONE,
}
FAST = {
    "up/kernel": LoraWeights(False, True, 2.0, True, None),
    "embed/embedding": LoraWeights(False, False, 2.0),
    "down/kernel": VeraWeights(True, True),
    "head/kernel": False,
    "norm/scale": True,
}


def test_updates_of_b_and_of_vectors_are_larger():
    optimizer = qj.lora_plus(optax.sgd(0.5), 4.0)
    updates, _ = optimizer.update(ADAPTERS, optimizer.init(ADAPTERS), ADAPTERS)
    expected = jax.tree.map(lambda fast: np.full(3, -2.0 if fast else -0.5), FAST)
    jax.tree.map(np.testing.assert_allclose, updates, expected)
    assert adapter_labels(ADAPTERS)["embed/embedding"] == LoraWeights("embedding", "embedding", 2.0)


@pytest.mark.standard_promotion
def test_as_a_setting_it_is_adamw_with_two_rates():
    """Decay of weights included, which is proportional to the rate."""
    for ratio in (1.0, 16.0):
        settings = TrainSettings(loraplus_lr_ratio=ratio, weight_decay=0.1)
        optimizer = settings.make_optimizer(10)
        updates, _ = optimizer.update(ADAPTERS, optimizer.init(ADAPTERS), ADAPTERS)
        expected = jax.tree.map(
            lambda fast, r=ratio: np.full(3, -2.2e-4 * (r if fast else 1)), FAST
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), updates, expected)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan")])
def test_ratios_that_are_none(ratio):
    with pytest.raises(qj.QloraError, match="the ratio of learning rates must be positive"):
        qj.lora_plus(optax.sgd(0.5), ratio)
    with pytest.raises(qj.QloraError, match="loraplus_lr_ratio must be positive"):
        TrainSettings(loraplus_lr_ratio=ratio)
