"""A run on eight virtual devices is the run on one; what lies where."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as qj
from benchmarks.mesh import collectives, moved_dense
from qlora_jax.models import init_params, read_config
from qlora_jax.parallel import Layout, make_mesh
from qlora_jax.parallel.rules import rules_for
from qlora_jax.quant import nf4_matmul, nf4_matmul_transposed, pieces
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.trainer import fit
from tests.training import models

pytestmark = pytest.mark.standard_promotion  # optax.adamw

BATCH, TIME, STEPS = 8, 10, 3
TARGETS = ("q_proj", "down_proj")


@functools.cache
def model() -> qj.Model:
    """K and N of whole blocks for two devices along each axis; an untied head.

    No weight has as many rows as a batch has tokens, so that the two can be told apart.
    """
    config = read_config(
        {
            "model_type": "llama",
            "vocab_size": 96,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    params = qj.quantize_tree(init_params(config, jax.random.key(1)), qj.NF4())
    return qj.Model(config, params, None, "random", jnp.float32)


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(STEPS):
        ids = rng.integers(0, 96, (BATCH, TIME)).astype(np.int32)
        labels = np.where(rng.random(ids.shape) < 0.3, -100, ids).astype(np.int32)
        made.append({"input_ids": ids, "labels": labels})
    return made


def start() -> tuple[Any, Any]:
    optimizer = optax.adamw(1e-2)
    config = qj.LoraConfig(rank=4, targets=TARGETS)
    adapters = qj.lora.init(jax.random.key(0), model().params, config)
    return optimizer, qj.TrainState.create(adapters, optimizer)


@functools.cache
def losses_of_one_device() -> list[float]:
    optimizer, state = start()
    step = qj.make_train_step(model().loss, optimizer)
    losses = []
    for batch in batches():
        state, metrics = step(state, model().params, batch)
        losses.append(float(metrics["loss"]))
    return losses


def losses_on(spec: str) -> tuple[list[float], Any, Any]:
    layout = Layout.of(make_mesh(spec), model().config)
    optimizer, state = start()
    params, state = layout.params(model().params), layout.state(state)
    shardings = layout.state_shardings(state)
    step = qj.make_train_step(model().loss, optimizer, state_shardings=shardings)
    losses = []
    for batch in batches():
        state, metrics = step(state, params, layout.batch(batch))
        losses.append(float(metrics["loss"]))
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    program = step.lower(state, params, layout.batch(batch)).compile().as_text()
    assert not moved_dense(collectives(program), params)
    return losses, params, state


@pytest.mark.parametrize(
    "spec",
    [
        *(pytest.param(f"{axis}=8", marks=pytest.mark.slow) for axis in ("data", "fsdp", "tensor")),
        "data=2,fsdp=2,tensor=2",
    ],
)
def test_losses_are_those_of_one_device(spec: str) -> None:
    losses, params, state = losses_on(spec)
    np.testing.assert_allclose(losses, losses_of_one_device(), atol=1e-5, rtol=0)
    if spec != "data=8":
        weight = params["layers"]["mlp"]["down_proj"]["kernel"]
        parts = 4 if "data" in spec else 8
        for leaf in (weight.codes, weight.scales):
            assert leaf.sharding.shard_shape(leaf.shape)[1:] != leaf.shape[1:]
            assert leaf.addressable_shards[0].data.size * parts == leaf.size
        for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
            a = moment["layers/mlp/down_proj/kernel"].a
            assert a.sharding == state.adapters["layers/mlp/down_proj/kernel"].a.sharding
            assert a.addressable_shards[0].data.size * parts == a.size


@pytest.mark.slow
def test_fit_on_a_mesh(tmp_path: Any) -> None:
    """Evaluation and a saved adapter included; the optimizer's state in the host's memory."""
    settings = TrainSettings(steps=2, batch_size=4, accumulate=2)
    config = qj.LoraConfig(rank=4, targets=TARGETS)
    runs = [
        fit(
            models.model(),
            config,
            models.dataset(),
            dataclasses.replace(settings, paged=mesh is not None),
            tmp_path / str(mesh),
            evaluation=models.dataset(5, seed=1),
            mesh=mesh and make_mesh(mesh),
            display=False,
        )
        for mesh in (None, "fsdp=4,tensor=2")
    ]
    for one, other in zip(*(run.history for run in runs), strict=True):
        for name in one.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert one[name] == pytest.approx(other[name], abs=1e-5)
    saved, _ = qj.peft.load(tmp_path / "fsdp=4,tensor=2", models.model())
    jax.tree.map(np.testing.assert_array_equal, saved, runs[1].adapters)


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
@pytest.mark.parametrize("spec", ["tensor=2", "fsdp=2"])
def test_pieces_of_a_devices_part_find_their_scales(spec: str, name: str, monkeypatch: Any) -> None:
    """256 scales share a nested absmax across columns, whose sizes differ here; seven rows cannot
    be split, so that with fsdp the weight is."""
    k, n = 512, 1024
    monkeypatch.setattr(pieces, "LIMIT", 2**16)
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = jnp.exp(2 * jax.random.normal(keys[1], (1, n)))
    weight = qj.quantize(jax.random.normal(keys[0], (k, n)) * sizes, qj.NF4())
    mesh = make_mesh(spec, jax.devices()[:2])
    layout = Layout(mesh, rules_for("llama"))
    placed = layout.params({"layers": {"attention": {name: {"kernel": weight}}}})
    placed = placed["layers"]["attention"][name]["kernel"]
    dense = weight.dequantize(jnp.float32)
    x, g = jax.random.normal(keys[2], (7, k)), jax.random.normal(keys[3], (7, n))
    for product, expected in ((nf4_matmul, x @ dense), (nf4_matmul_transposed, g @ dense.T)):
        ours = jax.jit(product)(x if product is nf4_matmul else g, placed)
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * scale)


def test_a_batch_that_cannot_be_split(tmp_path: Any) -> None:
    settings = TrainSettings(steps=1, batch_size=6)
    with pytest.raises(qj.QloraError, match="6 examples cannot be split over data x fsdp = 8"):
        fit(
            models.model(),
            qj.LoraConfig(targets=TARGETS),
            models.dataset(),
            settings,
            tmp_path / "out",
            mesh=make_mesh(),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,fsdp=2,tensor=2", "tensor=8"])
def test_own_rows_make_the_batch(spec: str) -> None:
    """Of one process all of them."""
    layout = Layout.of(make_mesh(spec), model().config)
    assert layout.own_rows(16) == list(range(16))
    batch = {"input_ids": np.arange(3 * 16 * 5).reshape(3, 16, 5)}
    own, whole = layout.own_batch(batch, 16, axis=1), layout.batch(batch, axis=1)
    assert own["input_ids"].sharding == whole["input_ids"].sharding
    np.testing.assert_array_equal(own["input_ids"], whole["input_ids"])
