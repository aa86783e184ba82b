"""Paged optimizers: the same updates, with the state elsewhere."""

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import qlora_jax as qj
from qlora_jax.data import batches
from qlora_jax.lora import LoraWeights
from qlora_jax.parallel.rules import in_host_memory
from qlora_jax.training.divisors import with_divisors
from qlora_jax.training.paged import is_paged
from qlora_jax.training.pages import Cut, Whole, layout
from qlora_jax.training.settings import OptimizerName, TrainSettings
from tests import xla_options
from tests.training import models

pytestmark = pytest.mark.standard_promotion  # optax

RATE = optax.cosine_decay_schedule(1e-2, 5)
OPTIMIZERS = {
    "adamw": optax.adamw(
        RATE, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 2, p)
    ),
    "adafactor": optax.adafactor(RATE, min_dim_size_to_factor=8),
    "lion": optax.lion(RATE),
    "lora_plus": qj.lora_plus(optax.adamw(RATE), 16.0),
    "adamw8bit": qj.adamw8bit(RATE, weight_decay=0.1),
}
PAGE = 2000
"""Bytes: some parameters below are smaller, some larger."""


def parameters():
    a, b, c = (np.random.default_rng(i) for i in range(3))
    return {
        "layers/q_proj/kernel": LoraWeights(
            jnp.asarray(a.normal(size=(5, 16, 4)), jnp.float32),
            jnp.asarray(b.normal(size=(5, 4, 48)), jnp.float32),
            2.0,
        ),
        "lm_head/kernel": jnp.asarray(c.normal(size=(16, 20)), jnp.float32),
        "norm/scale": jnp.ones((16,), jnp.float32),
        "fixed": None,
    }


def large():
    """Of a size whose moments adamw8bit keeps in 8 bits, in several pages."""
    random = np.random.default_rng(3)
    shapes = {"a": (3, 80, 64), "b": (3, 64, 90), "head": (96, 70), "scale": (64,)}
    return {name: jnp.asarray(random.normal(size=x), jnp.float32) for name, x in shapes.items()}


def steps(optimizer, count=3, make=parameters):
    """Parameters and state after some updates, with fusions made as users have them (conftest)."""
    params = make()
    state = optimizer.init(params)
    options: dict[str, Any] = {}
    if xla_options.has("xla_cpu_use_fusion_emitters", True):
        options["xla_cpu_use_fusion_emitters"] = True
    update = jax.jit(optimizer.update, compiler_options=options)
    for i in range(count):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(x * 37 + i) * 0.1, params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def on_host(state):
    return {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"pinned_host"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_the_optimizer_to_the_bit(name):
    optimizer = OPTIMIZERS[name]
    found, state = steps(qj.paged(optimizer, PAGE))
    expected, _ = steps(optimizer)
    assert len(state.layout) > 2 and on_host(state)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.slow
def test_many_updates_of_large_parameters_too(name):
    optimizer = OPTIMIZERS[name]
    found, state = steps(qj.paged(optimizer, 50_000), 20, large)
    expected, _ = steps(optimizer, 20, large)
    assert len(state.layout) > 2
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_number_that_divides_one_parameter_alone_is_not_shared():
    """The mean of a gradient is its own, the count is every parameter's."""

    def update(grads, count):
        correction = 1 - 0.9 ** (count + 1)
        return [g / correction / jnp.mean(g) for g in grads], count + 1

    grads, count = [jnp.arange(1.0, 7.0), jnp.arange(3.0, 9.0)], jnp.array(2)
    (updates, after), divisors = with_divisors(update, (grads, count), (True, False))
    assert divisors and int(after) == 3
    np.testing.assert_allclose(divisors, [1 - 0.9**3] * len(divisors), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, updates, update(grads, count)[0])


def test_pages_hold_every_parameter_and_are_bounded():
    params = jax.tree.leaves(parameters())
    together, a, b, head = layout(OPTIMIZERS["adamw"], parameters(), PAGE)
    # Two moments and an update of the norm's scale, fp32. 5 has no divisors but 1 and 5.
    assert together == Whole((3,)) and (a, b) == (Cut(0, 1), Cut(1, 1))
    assert head == Cut(2, 8) and 8 * 20 * 12 <= PAGE < 16 * 20 * 12
    assert [x.shape[0] for x in params] == [5, 5, 16, 16]
    everything = layout(OPTIMIZERS["adamw"], parameters(), 2**20)
    assert everything == (Whole((0, 1, 2, 3)),)
    assert qj.paged(optax.sgd(0.1), PAGE).init({}).layout == ()


def test_an_optimizer_that_looks_at_whole_parameters_is_not_cut():
    pages = layout(OPTIMIZERS["adafactor"], parameters(), 1)
    assert pages == tuple(Whole((i,)) for i in range(4))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), "update of .*depends on"),
        (optax.apply_if_finite(optax.adam(1e-2), 3), "update of .* depends on"),
        (optax.flatten(optax.adam(1e-2)), "update of .* depends on"),
        (optax.normalize_by_update_norm(), "optax.chain"),
        (optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)), "draw the same random numbers"),
    ],
)
def test_an_optimizer_that_mixes_parameters_is_refused(optimizer, message):
    with pytest.raises(qj.QloraError, match=message):
        qj.paged(optimizer).init(parameters())


def test_clipping_goes_outside():
    clip = optax.clip_by_global_norm(0.1)
    found, _ = steps(optax.chain(clip, qj.paged(optax.adamw(1e-2), PAGE)), 1)
    expected, _ = steps(optax.chain(clip, optax.adamw(1e-2)), 1)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_bad_input():
    with pytest.raises(qj.QloraError, match="page_bytes must be at least 1, got 0"):
        qj.paged(optax.adamw(1e-2), 0)
    optimizer = qj.paged(optax.sgd(0.1, momentum=0.9), 1)
    params = {"w": jnp.ones((2, 4))}
    state = optimizer.init(params)
    with pytest.raises(qj.QloraError, match="update of float32 .* gradient of bfloat16"):
        optimizer.update({"w": jnp.ones((2, 4), jnp.bfloat16)}, state, params)


def test_the_train_step_needs_to_know_nothing():
    """State comes back to the host, what was donated is gone, and nothing compiles twice."""
    model, optimizer = models.model(), qj.paged(optax.adamw(1e-2), 4000)
    config = qj.LoraConfig(rank=4, targets=("q_proj",))
    batch = next(batches(models.dataset(), 4, seed=0, sequence_length=32))
    adapters = qj.lora.init(jax.random.key(1), model.params, config)
    state = qj.TrainState.create(adapters, optimizer)
    step, losses = qj.make_train_step(model.loss, optimizer, max_grad_norm=0.3), []
    for _ in range(4):
        before = state.opt_state
        state, metrics = step(state, model.params, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert step._cache_size() == 1
    assert on_host(state.opt_state)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.adapters)} == {"device"}


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_as_settings(name):
    """Each takes a step against the gradient of about the learning rate, paged or not."""
    settings = TrainSettings(optimizer=name, learning_rate=0.5)
    params, grads = {"w": jnp.zeros((4, 4))}, {"w": jnp.full((4, 4), 0.1)}
    for chosen in (settings, dataclasses.replace(settings, paged=True)):
        optimizer = chosen.make_optimizer(10)
        state = optimizer.init(params)
        assert is_paged(state) is chosen.paged
        updates, _ = optimizer.update(grads, state, params)
        np.testing.assert_allclose(updates["w"], -0.5, rtol=1e-5)
    with pytest.raises(qj.QloraError, match="one of adamw, adamw8bit, lion, adafactor, got 'sgd'"):
        TrainSettings(optimizer="sgd")  # pyright: ignore[reportArgumentType]


def test_sharded_state_stays_sharded():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    spec = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    params = {"w": jax.device_put(jnp.ones((4, 8, 16)), spec)}
    optimizer = qj.paged(optax.adamw(1e-2), 1536)  # a row
    state = optimizer.init(params)
    assert state.layout == (Cut(0, 1),)
    wanted = in_host_memory(state, jax.tree.map(lambda _: spec, state))

    def check(state):
        for x in (state.inner[0].mu["w"], state.inner[0].nu["w"]):
            assert x.sharding.is_equivalent_to(spec.with_memory_kind("pinned_host"), 3)

    check(state)
    assert {s.memory_kind for s in jax.tree.leaves(wanted)} == {"pinned_host"}
    check(qj.TrainState.create(params, optimizer).opt_state)
    _, state = jax.jit(optimizer.update)(params, state, params)
    check(state)
