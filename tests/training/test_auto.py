import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.errors import QloraError
from qlora_jax.lora import LoraConfig
from qlora_jax.models import read_config
from qlora_jax.plan import abstract
from qlora_jax.training.auto import choose, fitting
from qlora_jax.training.settings import TrainSettings
from tests.training.test_estimate import ABOUT, FORMAT

pytestmark = [
    pytest.mark.standard_promotion,  # optax
    pytest.mark.slow,
]

SETTINGS = TrainSettings(batch_size=8, memory="auto")


@pytest.fixture(scope="module")
def step():
    config = read_config(ABOUT)
    return abstract.train_step(config, 64, LoraConfig(rank=4), SETTINGS, FORMAT, jnp.bfloat16)


def test_the_fastest_that_fits_is_chosen(step):
    def with_room(room):
        return choose(step.model, SETTINGS, step.state, step.batch, room, decoded=0)

    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def total(remat):
        training = dataclasses.replace(SETTINGS, remat=remat)
        return dataclasses.replace(step, training=training).estimate(where, decoded=0).total

    assert with_room(10**12)[0].remat == "none"
    for remat in ("names", "full"):
        chosen, words = with_room(total(remat))
        assert (chosen.remat, chosen.paged) == (remat, False) and remat in words
    chosen, words = with_room(total("full") - 1)
    assert (chosen.remat, chosen.paged) == ("full", True) and "paged" in words
    chosen, words = with_room(1000)
    assert (chosen.remat, chosen.paged) == ("offload", True) and "too much" in words


def test_without_a_limit_the_settings_stay(step):
    settings = dataclasses.replace(SETTINGS, remat="names")
    assert jax.devices()[0].memory_stats() is None  # a CPU
    chosen, words = fitting(step.model, settings, step.state, step.batch)
    assert chosen == settings and "names stays" in words


def test_it_is_checked():
    with pytest.raises(QloraError, match="memory must be manual or auto"):
        TrainSettings(memory="some")  # type: ignore[arg-type]
