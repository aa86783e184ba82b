"""What tells one base, or one data set, from another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.training.fingerprint import base_fingerprint, data_fingerprint
from tests.training import models


def of(x: jax.Array) -> str:
    return base_fingerprint(dataclasses.replace(models.model(), params={"x": x}))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bfloat16", "float32"])
def test_every_bit_and_its_place_count(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 100, (6, 16)), dtype)
    found = of(x)
    assert found == of(jnp.array(x))
    for other in (x.at[5, 15].add(1), x[:, ::-1], x[::-1], x.reshape(16, 6), x * 0):
        assert of(other) != found
    # Two numbers that change places, and a zero that becomes another zero.
    assert of(x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])) != found
    if dtype.endswith("float32"):
        assert of(x.at[0, 0].set(0.0)) != of(x.at[0, 0].set(-0.0))


def test_how_it_is_split_does_not():
    x = jax.random.normal(jax.random.key(0), (8, 64))
    mesh = jax.make_mesh((8,), ("x",))
    for spec in (("x",), (None, "x")):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert of(jax.device_put(x, sharding)) == of(x)


def test_architecture_names_and_data():
    model = models.model()
    config = dataclasses.replace(model.config, rms_norm_eps=1e-3)
    assert base_fingerprint(model) != base_fingerprint(dataclasses.replace(model, config=config))
    renamed = {("y" if name == "norm" else name): x for name, x in model.params.items()}
    assert base_fingerprint(model) != base_fingerprint(dataclasses.replace(model, params=renamed))
    data = models.dataset()
    turned = dataclasses.replace(data, examples=data.examples[::-1])
    others = (turned, models.dataset(11), dataclasses.replace(data, pad_id=1))
    assert len({data_fingerprint(x) for x in (data, *others)}) == 4
    assert data_fingerprint(data) == data_fingerprint(models.dataset())
