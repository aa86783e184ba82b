"""Steps whose loss or gradient is not finite."""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as qj
from qlora_jax.data import TokenizedDataset, TokenizedExample, batches
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.trainer import fit
from tests.training import models

pytestmark = [
    pytest.mark.standard_promotion,  # optax.adamw
    pytest.mark.slow,
]
CONFIG = qj.LoraConfig(rank=4, alpha=8, targets=("q_proj", "down_proj"))
BAD = 63
"""A token that no example of `models.dataset` has."""


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> qj.Model:
    """Its loss is not finite on batches with the token BAD."""
    real = qj.Model.loss

    def loss(self: qj.Model, params: Any, batch: Any, **options: Any) -> Any:
        total, tokens = real(self, params, batch, **options)
        return jnp.where((batch["input_ids"] == BAD).any(), jnp.nan, total), tokens

    monkeypatch.setattr(qj.Model, "loss", loss)
    return models.model()


def spoiled(numbers: set[int]) -> TokenizedDataset:
    """Examples with the token BAD at those places, all of them named."""
    dataset = models.dataset()
    examples = [
        TokenizedExample(
            np.append(x.input_ids, BAD if i in numbers else 1).astype(np.int32),
            np.append(x.labels, 1).astype(np.int32),
            f"rows.jsonl, line {i + 1}",
        )
        for i, x in enumerate(dataset)
    ]
    return dataclasses.replace(dataset, examples=tuple(examples))


@pytest.mark.parametrize(
    ("what", "accumulate", "page_bytes"),
    [("loss", 2, None), ("gradient", 1, None), ("loss", 1, 500)],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(what, accumulate, page_bytes):
    """Of two micro-batches it is enough that one is not; in whatever memory the state is."""
    model, optimizer = models.model(), qj.lora_plus(optax.adamw(1e-2), 4)
    if page_bytes is not None:
        optimizer = qj.paged(optimizer, page_bytes)
    adapters = qj.lora.init(jax.random.key(1), model.params, CONFIG)

    def loss(params: Any, batch: Any) -> Any:
        bad = (batch["input_ids"] == BAD).any()
        total, tokens = model.loss(params, batch)
        if what == "loss":
            return jnp.where(bad, jnp.inf, total), tokens
        # Zero, with a gradient whose squares are beyond fp32.
        spike = params["layers"]["self_attn"]["q_proj"]["kernel"].a.sum()
        return total + jnp.where(bad, 1e30, 0) * (spike - jax.lax.stop_gradient(spike)), tokens

    good = next(batches(models.dataset(), 2 * accumulate, seed=0, sequence_length=32))
    bad = {**good, "input_ids": good["input_ids"].copy()}
    bad["input_ids"][0, 0] = BAD
    if accumulate > 1:
        good, bad = (jax.tree.map(lambda x: x.reshape(2, 2, -1), b) for b in (good, bad))
    step = qj.make_train_step(loss, optimizer, accumulate=accumulate)
    state = qj.TrainState.create(adapters, optimizer)
    state, metrics = step(state, model.params, good)
    assert float(metrics["skipped"]) == 0
    before = jax.tree.map(np.array, (state.adapters, state.opt_state))
    state, metrics = step(state, model.params, bad)
    assert float(metrics["skipped"]) == 1
    assert not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"])
    after = jax.tree.map(np.array, (state.adapters, state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert int(state.step) == 2
    state, metrics = step(state, model.params, good)
    assert float(metrics["skipped"]) == 0 and _counts(state.opt_state) == {2}


def _counts(opt_state: Any) -> set[int]:
    """What an optimizer counts of steps, wherever it does."""
    flat, _ = jax.tree_util.tree_flatten_with_path(opt_state)
    return {int(x) for path, x in flat if jax.tree_util.keystr(path).endswith("count")}


SETTINGS = TrainSettings(steps=6, batch_size=2, learning_rate=1e-2, schedule="linear")


def test_skipped_steps_are_counted_and_the_schedule_waits(poisoned, tmp_path):
    settings = dataclasses.replace(SETTINGS, log_every=6)
    result = fit(poisoned, CONFIG, spoiled({5}), settings, tmp_path / "out", display=False)
    text = (tmp_path / "out/metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    (skipped,) = [e for e in lines if "loss" not in e]
    assert lines == result.history and skipped["skipped"] == lines[-1]["skipped"] == 1
    rates = 1e-2 * (1 - np.arange(6) / 6)
    assert lines[-1]["learning_rate"] == pytest.approx(rates[4], rel=1e-5)
    qj.peft.load(tmp_path / "out", models.model())  # which refuses what is not finite


def test_too_many_in_a_row_stop_the_run_and_name_the_rows(poisoned, tmp_path):
    output = tmp_path / "out"
    settings = dataclasses.replace(SETTINGS, max_skipped=2)
    train = spoiled(set(range(12)))
    with pytest.raises(qj.QloraError, match="not finite in 3 steps in a row") as error:
        fit(poisoned, CONFIG, train, settings, output, display=False)
    # Found out one step behind: a third one was on its way.
    assert f"saved in {output / 'step-3'}" in str(error.value)
    named = re.findall(r"example (\d+) \(rows.jsonl, line (\d+)\)", str(error.value))
    assert all(int(line) == int(number) + 1 for number, line in named)
    assert len(set(named)) == 6, "three batches of two rows of twelve"
    assert not (output / "adapter_model.safetensors").exists()
    saved, _ = qj.peft.load(output / "step-3", models.model())
    begun = qj.lora.init(jax.random.split(jax.random.key(0))[0], models.model().params, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, saved, begun)
    # Going on with the same data it stops again; allowed more, it comes to the end.
    settings = dataclasses.replace(SETTINGS, max_skipped=9)
    result = fit(poisoned, CONFIG, train, settings, output, resume=True, display=False)
    assert [e["skipped"] for e in result.history] == [1, 2, 3, 4, 5, 6]
