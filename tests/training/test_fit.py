"""Whole runs of the trainer."""

import dataclasses
import json
import math
import re
import signal

import jax
import numpy as np
import optax
import pytest

import qlora_jax as qj
from qlora_jax.data import TokenizedExample
from qlora_jax.training import trainer
from qlora_jax.training.checkpoints import check_output
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.stream import StepBatches
from tests.training import models

# Two of seven modules: most of a test's time goes into compiling, which adapters add to.
CONFIG = qj.LoraConfig(rank=4, alpha=8, dropout=0.05, targets=("q_proj", "down_proj"))
HELD_OUT = models.dataset(5, seed=1)
pytestmark = pytest.mark.standard_promotion  # optax.adamw


def fit(output, **changes):
    settings = TrainSettings(
        **({"steps": 6, "batch_size": 2, "learning_rate": 1e-2} | changes.pop("settings", {}))
    )
    options = {"display": False} | changes
    return trainer.fit(models.model(), CONFIG, models.dataset(), settings, output, **options)


def test_a_run_leaves_adapter_metrics_and_plot(tmp_path):
    settings = {"eval_every": 2, "save_every": 4, "accumulate": 2, "warmup": 0.5}
    result = fit(tmp_path / "out", settings=settings, evaluation=HELD_OUT)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [e["step"] for e in lines if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in lines if "eval_loss" in e] == [2, 4, 6]
    assert all(e["input_seconds"] >= 0 for e in lines if "loss" in e)
    rates = [e["learning_rate"] for e in lines if "loss" in e]
    np.testing.assert_allclose(rates, np.array([1, 2, 3, 3, 3, 3]) * 1e-2 / 3, rtol=1e-5)
    assert lines[-1]["eval_loss"] < lines[2]["eval_loss"]
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    for folder in ("out", "out/step-4"):
        adapters, config = qj.peft.load(tmp_path / folder, models.model())
        assert config.dropout == 0.05
    final, _ = qj.peft.load(tmp_path / "out", models.model())
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), final, result.adapters))
    assert not result.interrupted


def test_a_packed_run_takes_fewer_steps(tmp_path):
    """12 examples of 6 to 19 tokens: packed, they are three rows."""
    settings = {"steps": None, "batch_size": 1, "sequence_length": 64, "packing": True}
    run = fit(tmp_path / "out", settings=settings)
    assert run.steps == 3
    whole = sum(e["tokens"] for e in run.history)
    assert whole == models.dataset().answer_tokens  # one epoch, each label once


def test_the_same_seed_is_the_same_run(tmp_path):
    runs = [
        fit(tmp_path / name, settings={"seed": s}) for name, s in (("a", 3), ("b", 3), ("c", 4))
    ]
    losses = [[e["loss"] for e in run.history if "loss" in e] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_an_interrupted_run_is_saved(tmp_path, monkeypatch, capsys):
    real = StepBatches.start

    def interrupted(self, step=0):
        for number, batch in enumerate(real(self, step)):
            if number == 3:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(StepBatches, "start", interrupted)
    result = fit(tmp_path / "out", display=True)
    assert result.interrupted and result.steps == len(result.history) == 4
    assert "interrupted after step 4" in capsys.readouterr().out
    adapters, _ = qj.peft.load(tmp_path / "out", models.model())
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), adapters, result.adapters))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(qj.QloraError, match=r"step 6: .* 5 steps in a row.*lower learning rate"):
        fit(tmp_path / "out", optimizer=optax.sgd(math.inf))
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        (
            range(5, 70),
            None,
            r"example 1 \(rows:2\) has 65 tokens, more than .* context of 64.*--max-length.*--so",
        ),
        (
            [3, 64, 5],
            None,
            r"example 1 \(rows:2\) has the token id 64, the model's vocabulary is 0 to 63",
        ),
        ([3, -1, 5], None, "has the token id -1"),
        ([3, 4, 5], [-100, 64, 5], "has the label 64"),
        ([3, 4, 5], [-100, -1, 5], "has the label -1.* nor -100"),
    ],
)
@pytest.mark.parametrize("held_out", [False, True])
def test_examples_that_the_model_cannot_take(ids, labels, message, held_out, tmp_path):
    """Said before anything is compiled or written."""
    ids = np.asarray(ids, np.int32) % 64 if len(ids) > 64 else np.asarray(ids, np.int32)
    labels = ids if labels is None else np.asarray(labels, np.int32)
    good = models.dataset(1)
    examples = (*good.examples, TokenizedExample(ids, labels, "rows:2"))
    bad = dataclasses.replace(good, examples=examples)
    train, evaluation = (good, bad) if held_out else (bad, None)
    with pytest.raises(qj.QloraError, match=message):
        trainer.fit(
            models.model(), CONFIG, train, TrainSettings(), tmp_path / "out", evaluation=evaluation
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_padding_token_that_the_model_lacks(tmp_path):
    """Such as a [PAD] that was added to a Llama's tokenizer: what embeds it would be NaN."""
    losses = []
    for pad_id in (0, 64):
        data = dataclasses.replace(models.dataset(6), pad_id=pad_id)
        settings = TrainSettings(steps=2, batch_size=3)
        out = tmp_path / str(pad_id)
        result = trainer.fit(
            models.model(), CONFIG, data, settings, out, evaluation=data, display=False
        )
        losses.append(
            [x for line in result.history for x in (line.get("loss"), line.get("eval_loss"))]
        )
    assert losses[0] == losses[1]


def test_examples_as_long_as_the_context(tmp_path):
    ids = np.arange(64, dtype=np.int32)
    whole = dataclasses.replace(models.dataset(1), examples=(TokenizedExample(ids, ids),))
    settings = TrainSettings(steps=1, batch_size=1)
    trainer.fit(models.model(), CONFIG, whole, settings, tmp_path / "out", display=False)


def test_what_cannot_be_saved_is_not_trained(tmp_path):
    model = models.model()
    model = dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, tie_word_embeddings=True),
        params={name: tree for name, tree in model.params.items() if name != "lm_head"},
    )
    config = qj.LoraConfig(rank=2, dora=True, targets=("embed_tokens",))
    settings = TrainSettings(steps=1)
    with pytest.raises(qj.QloraError, match="norms of their own under DoRA"):
        trainer.fit(model, config, models.dataset(), settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_overwritten(tmp_path):
    fit(tmp_path / "out", settings={"steps": 1})
    with pytest.raises(qj.QloraError, match="has an adapter already"):
        fit(tmp_path / "out")


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "out").touch()
    for resume in (False, True):
        with pytest.raises(qj.QloraError, match="out: a file; the output of a run is a folder"):
            check_output(tmp_path / "out", resume)


def test_progress_is_shown(tmp_path, capsys):
    fit(tmp_path / "out", display=True, evaluation=HELD_OUT)
    text = capsys.readouterr().out
    assert "step 6/6" in text and "tokens/s" in text and "held-out loss" in text
    assert re.search(r"GB  input \d+%", text)


@pytest.mark.slow
def test_going_on_from_an_adapter(tmp_path):
    first = fit(tmp_path / "a", evaluation=HELD_OUT)
    going_on = {"steps": 1, "learning_rate": 1e-9}
    second = fit(tmp_path / "b", adapters=first.adapters, settings=going_on, evaluation=HELD_OUT)
    assert second.history[-1]["eval_loss"] == pytest.approx(
        first.history[-1]["eval_loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"seed": 2**63}, "seed must be at most"),
        ({"warmup": 2.0}, "warmup must be a whole number"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be positive"),
        ({"schedule": "step"}, "schedule must be"),
        ({"buckets": 4}, "buckets must be 1 to 3"),
        ({"packing": True, "group_by_length": True}, "packed rows are all full"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(qj.QloraError, match=message):
        TrainSettings(**settings)


def test_steps_and_schedules():
    assert TrainSettings(epochs=2.0, batch_size=4, accumulate=2).steps_for(40) == 10
    assert TrainSettings(epochs=0.001).steps_for(40) == 1
    assert TrainSettings(steps=7).steps_for(40) == 7
    for name, last in (("constant", 1.0), ("linear", 1 / 6), ("cosine", 0.067)):
        rates = TrainSettings(learning_rate=1.0, schedule=name, warmup=0.4).learning_rates(10)
        values = [float(np.asarray(rates(i))) for i in range(10)]
        np.testing.assert_allclose(values[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
        assert values[-1] == pytest.approx(last, abs=1e-3), name


def test_an_attention_that_is_not_here(tmp_path):
    with pytest.raises(
        qj.QloraError, match="attention 'flash': expected one of xla, splash, cudnn"
    ):
        TrainSettings(attention="flash")
    with pytest.raises(qj.QloraError, match="cudnn"):
        fit(tmp_path / "out", settings={"attention": "cudnn"})
    fit(tmp_path / "xla", settings={"steps": 1, "attention": "xla"})
