"""DoRA and VeRA as adapters: what they start from, what of them is trained, merging."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as qj
from qlora_jax.data import batches
from qlora_jax.lora import dora
from qlora_jax.lora.vera import PROJECTIONS
from tests.lora.test_adapters import KERNEL, TABLE, K, L, N, tree
from tests.training import models

DORA = qj.LoraConfig(rank=4, alpha=8, targets=("up",), dora=True)
VERA = qj.VeraConfig(rank=4, targets=("up", "head"))


def moved(adapters, by=0.05):
    """The adapters with what is trained moved at random."""
    mask, tree = jax.tree.flatten(qj.lora.trained_mask(adapters))
    leaves = jax.tree.leaves(adapters)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [
        x + by * jax.random.normal(k, x.shape) if m else x
        for m, x, k in zip(mask, leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


@pytest.mark.parametrize("config", [DORA, VERA], ids=["dora", "vera"])
def test_nothing_changes_at_first(config):
    for params in (tree(), tree(quantized=True)):
        adapters = qj.lora.init(jax.random.key(0), params, config)
        dense = qj.lora.merge(params, {})
        merged = qj.lora.merge(params, adapters)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), merged, dense)


def test_norms_are_those_of_the_weight_as_it_is_multiplied():
    for params in (tree(), tree(quantized=True)):
        weights = moved(qj.lora.init(jax.random.key(0), params, DORA))[KERNEL]
        base = params["layers"]["up"]["kernel"]
        plain = dataclasses.replace(weights, magnitude=None).on(base).dequantize(jnp.float32)
        expected = np.linalg.norm(np.asarray(plain, np.float64), axis=1)
        np.testing.assert_allclose(dora.norms(weights.on(base)), expected, rtol=1e-5)


def test_a_column_of_zeros_stays_zero():
    params = {"up": {"kernel": jnp.eye(8)[:, :3].at[:, 1].set(0.0)}}
    adapters = qj.lora.init(jax.random.key(0), params, DORA)
    out = qj.lift(lambda p: jnp.ones(8) @ p["up"]["kernel"])(qj.lora.attach(params, adapters))
    np.testing.assert_allclose(out, [1.0, 0.0, 1.0], atol=1e-6)


@pytest.mark.parametrize("config", [DORA, VERA], ids=["dora", "vera"])
def test_unmerging_takes_the_adapter_out_again(config):
    adapters = moved(qj.lora.init(jax.random.key(0), tree(), config))
    merged = qj.lora.merge(tree(), adapters)
    assert np.abs(merged["layers"]["up"]["kernel"] - tree()["layers"]["up"]["kernel"]).max() > 0.005
    again = qj.lora.unmerge(merged, adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5), again, tree())


def test_what_a_merged_weight_does_not_say_is_not_guessed():
    adapters = moved(qj.lora.init(jax.random.key(0), tree(), DORA), by=1.0)
    with pytest.raises(qj.QloraError, match="keep the base instead"):
        qj.lora.unmerge(qj.lora.merge(tree(), adapters), adapters)


@pytest.mark.parametrize("config", [DORA, VERA], ids=["dora", "vera"])
def test_unmerging_adapters_of_other_weights_is_refused(config):
    adapters = qj.lora.init(jax.random.key(0), tree(), config)
    with pytest.raises(qj.QloraError, match=f"{KERNEL}: no such parameter"):
        qj.lora.unmerge({"head": tree()["head"]}, adapters)
    turned = {"up": {"kernel": jnp.swapaxes(tree()["layers"]["up"]["kernel"], 1, 2)}}
    with pytest.raises(qj.QloraError, match=f"do not fit the parameters:\n  {KERNEL}: "):
        qj.lora.unmerge(tree() | {"layers": turned}, adapters)


def test_only_what_is_trained_is_counted_and_has_optimizer_state():
    params = tree(quantized=True)
    adapters = qj.lora.init(jax.random.key(0), params, DORA)
    assert qj.lora.count(adapters) == L * (K * 4 + 4 * N + N)
    state = qj.TrainState.create(adapters, optax.sgd(0.1, momentum=0.9))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == qj.lora.count(adapters)
    adapters = qj.lora.init(jax.random.key(0), params, VERA)
    assert qj.lora.count(adapters) == (L + 1) * (4 + N)
    state = qj.TrainState.create(adapters, optax.sgd(0.1, momentum=0.9))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == qj.lora.count(adapters)


def test_abstract_parameters_are_enough_to_count():
    params = jax.eval_shape(lambda: tree(quantized=True))
    made = jax.eval_shape(lambda key: qj.lora.init(key, params, DORA), jax.random.key(0))
    assert qj.lora.count(made) == L * (K * 4 + 4 * N + N)


@pytest.mark.parametrize(
    "config",
    [
        qj.LoraConfig(rank=4, alpha=8, targets=("q_proj", "down_proj"), dora=True),
        qj.VeraConfig(rank=4, targets=("q_proj", "down_proj")),
    ],
    ids=["dora", "vera"],
)
def test_a_step_trains_what_is_trained_and_leaves_the_rest(config):
    """Micro-batches give the gradient of the whole batch, here too."""
    model = models.model()
    adapters = moved(qj.lora.init(jax.random.key(0), model.params, config))
    batch = next(batches(models.dataset(), 4, seed=0, sequence_length=32))
    after = []
    for parts in (1, 2):
        optimizer = optax.sgd(0.1)
        step = qj.make_train_step(model.loss, optimizer, accumulate=parts)
        fed = batch if parts == 1 else jax.tree.map(lambda x: x.reshape(2, 2, -1), batch)
        state, _ = step(qj.TrainState.create(adapters, optimizer), model.params, fed)
        after.append(state.adapters)
    for trained, x, y, z in zip(
        *map(jax.tree.leaves, (qj.lora.trained_mask(adapters), adapters, *after)), strict=True
    ):
        np.testing.assert_allclose(y, z, rtol=0, atol=1e-5)
        assert bool((x != y).any()) == trained


def test_vera_refuses_what_it_cannot_adapt():
    with pytest.raises(qj.QloraError, match=f"linear layers only, not of {TABLE}"):
        qj.lora.init(jax.random.key(0), tree(), qj.VeraConfig(targets=("embed_tokens",)))
    adapters = qj.lora.init(jax.random.key(0), tree(), VERA)
    without = {path: x for path, x in adapters.items() if path != PROJECTIONS}
    with pytest.raises(qj.QloraError, match=f"a VeRA adapter without {PROJECTIONS}"):
        qj.lora.attach(tree(), without)
    shared = adapters[PROJECTIONS]
    small = adapters | {PROJECTIONS: dataclasses.replace(shared, a=shared.a[:-1])}
    with pytest.raises(qj.QloraError, match=f"projections for {K - 1} x {N}, the weight"):
        qj.lora.attach(tree(), small)
    wide = dataclasses.replace(adapters[KERNEL], lambda_b=jnp.ones((L, N + 1)))
    with pytest.raises(qj.QloraError, match="do not fit the parameter's"):
        qj.lora.attach(tree(), adapters | {KERNEL: wide})
    with pytest.raises(qj.QloraError, match="do not fit the parameter's"):
        qj.lora.attach(tree(quantized=True), adapters | {KERNEL: adapters["head/kernel"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"rank": 2.0}, "must be an integer, got rank = 2.0"),
        ({"d_initial": float("nan")}, "d_initial must be finite"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"projection_prng_key": -1}, "projection_prng_key must be in"),
        ({"targets": "q_proj("}, "is not a regular expression"),
    ],
)
def test_vera_settings_out_of_range(settings, message):
    with pytest.raises(qj.QloraError, match=message):
        qj.VeraConfig(**settings)
