"""Runs that stop, by whatever cause, and go on as if they had not."""

import dataclasses
import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as qj
from qlora_jax.training import checkpoints as checkpoints_module
from qlora_jax.training.checkpoints import RunCheckpoints, day_of, is_finished
from qlora_jax.training.evaluation import HeldOut
from qlora_jax.training.pages import Cut
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.stream import StepBatches
from qlora_jax.training.trainer import FitResult, fit
from tests.training import models

pytestmark = [
    pytest.mark.standard_promotion,  # optax.adamw
    pytest.mark.slow,
]

CONFIG = qj.LoraConfig(rank=4, alpha=8, dropout=0.05, targets=("q_proj", "down_proj"))
SETTINGS = TrainSettings(
    steps=6, batch_size=2, learning_rate=1e-2, schedule="linear", save_every=2, eval_every=3, keep=2
)
HELD_OUT = models.dataset(5, seed=1)


def run(output: Path, *, resume: bool = False, **changes: Any) -> FitResult:
    model, train = changes.pop("model", models.model()), changes.pop("train", models.dataset())
    optimizer = changes.pop("optimizer", None)
    settings = dataclasses.replace(SETTINGS, **changes)
    options = {"evaluation": HELD_OUT, "resume": resume, "display": False, "optimizer": optimizer}
    return fit(model, CONFIG, train, settings, output, **options)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """stop(after, by): the next run gets the signal `by` in its step `after`."""
    real = StepBatches.start

    def arrange(after: int, by: signal.Signals) -> None:
        def stopped(self: StepBatches, step: int = 0) -> Iterator[Any]:
            for number, batch in enumerate(real(self, step), start=step + 1):
                if number == after:
                    monkeypatch.setattr(StepBatches, "start", real)
                    signal.raise_signal(by)
                yield batch

        monkeypatch.setattr(StepBatches, "start", stopped)

    return arrange


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "out"
    with jax.numpy_dtype_promotion("standard"):
        run(output)
    return output


def adapter(output: Path) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()


def lines(output: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    clock = {"seconds", "input_seconds", "tokens_per_second", "memory_bytes"}
    return [{k: x for k, x in entry.items() if k not in clock} for entry in found]


def steps(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if "step-" in path.name)


def copy(whole: Path, output: Path, step: int) -> Path:
    """What a run killed after the checkpoint of `step` leaves."""
    import shutil

    shutil.copytree(whole, output)
    for path in output.glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (output / "adapter_model.safetensors").unlink()
    return output


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_to_the_bit(by, whole, tmp_path, stop):
    output = tmp_path / "out"
    stop(3, by)
    first = run(output)
    assert first.interrupted and first.steps == 3
    assert "step-3" in steps(output) and not is_finished(output)
    second = run(output, resume=True)
    assert not second.interrupted and second.steps == 6
    assert adapter(output) == adapter(whole)
    # The evaluation of step 3, which the signal cut short, is made up for; nothing stands twice.
    assert lines(output) == lines(whole)
    assert [e["step"] for e in lines(output)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert is_finished(output)


def test_a_killed_run_goes_on_from_its_newest_checkpoint(whole, tmp_path, capsys):
    """With lines of steps that are now done again, the last of them cut short."""
    output = copy(whole, tmp_path / "out", step=4)
    (output / ".step-5.part").mkdir()
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run(output, resume=True)
    assert adapter(output) == adapter(whole) and lines(output) == lines(whole)
    assert steps(output) == ["step-4", "step-6"]


def test_an_evaluation_that_fails_loses_no_step(whole, tmp_path, monkeypatch):
    def fails(*_: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED")

    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="EXHAUSTED"):
        patch.setattr(HeldOut, "evaluate", fails)
        run(output)
    assert "step-3" in steps(output)  # not one at which the run saves anyway
    run(output, resume=True)
    assert adapter(output) == adapter(whole) and lines(output) == lines(whole)


def test_a_run_that_is_finished_says_so(whole, tmp_path, capsys):
    import shutil

    output = tmp_path / "out"
    shutil.copytree(whole, output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("step-*/**/*")}
    model, train = models.model(), models.dataset()
    result = fit(model, CONFIG, train, SETTINGS, output, evaluation=HELD_OUT, resume=True)
    assert "finished, all 6 steps" in capsys.readouterr().out
    assert result.steps == 6 and not result.interrupted
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("step-*/**/*")}
    with pytest.raises(qj.QloraError, match="has an adapter already, or a checkpoint"):
        run(output)
    (output / "adapter_model.safetensors").unlink()
    with pytest.raises(qj.QloraError, match="has an adapter already, or a checkpoint"):
        run(output)


def test_an_adapter_without_a_checkpoint_is_not_begun_anew(whole, tmp_path):
    """As after a run whose checkpoints were removed to make room."""
    import shutil

    output = tmp_path / "out"
    shutil.copytree(whole, output)
    for path in output.glob("step-*"):
        shutil.rmtree(path)
    with pytest.raises(qj.QloraError, match="an adapter, but no whole checkpoint to go on from"):
        run(output, resume=True)
    assert adapter(output) == adapter(whole) and lines(output) == lines(whole)


def test_the_day_that_the_template_was_told_stays_with_the_run(tmp_path):
    data = dataclasses.replace(models.dataset(), today="2024-07-26")
    settings = dataclasses.replace(SETTINGS, steps=1)
    fit(models.model(), CONFIG, data, settings, tmp_path / "out", display=False)
    assert day_of(tmp_path / "out") == "2024-07-26"
    assert day_of(tmp_path / "none") is None


def test_nothing_to_resume_begins(whole, tmp_path):
    run(tmp_path / "out", resume=True)
    assert adapter(tmp_path / "out") == adapter(whole)


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, capsys):
    """Whichever of its files is cut short, or gone."""
    checkpoint = whole / "step-6"
    files = [p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.stat().st_size > 20]
    files = [path for path in files if (checkpoint / path).is_file()]
    assert len(files) > 5
    for number, file in enumerate(files):
        output = copy(whole, tmp_path / str(number), step=6)
        data = (output / "step-6" / file).read_bytes()
        (output / "step-6" / file).write_bytes(data[: len(data) // 2])
        found = RunCheckpoints(output).newest()
        assert found is not None and found.step == 4
        said = capsys.readouterr().out
        assert "damaged" in said and str(Path("step-6") / file) in said
    run(output, resume=True)
    assert adapter(output) == adapter(whole) and lines(output) == lines(whole)
    assert is_finished(output)


@pytest.mark.parametrize(
    ("where", "code"), [("mkdir", errno.EROFS), ("rename", errno.ENOSPC), ("open", errno.ENOSPC)]
)
def test_a_checkpoint_that_cannot_be_written(where, code, whole, tmp_path, monkeypatch):
    """The second one: the first is kept, and the run goes on from it."""
    output = tmp_path / "out"

    def fails(real: Any) -> Any:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            if ".step-4.part" in str(path):
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        if where == "mkdir":
            patch.setattr(Path, "mkdir", fails(Path.mkdir))
        elif where == "rename":
            patch.setattr(checkpoints_module.os, "replace", fails(os.replace))
        else:
            patch.setattr(checkpoints_module, "_write_json", fails(checkpoints_module._write_json))
        with pytest.raises(qj.QloraError, match=f"step 4 could not be .*{os.strerror(code)}") as e:
            run(output)
    assert f"{output / 'step-2'} is whole" in str(e.value)
    assert steps(output) == ["step-2"]
    run(output, resume=True)
    assert adapter(output) == adapter(whole) and lines(output) == lines(whole)


def test_another_run_is_refused(whole, tmp_path):
    """Naming both sides; what does not change the curve may change."""
    output = copy(whole, tmp_path / "out", step=4)
    kernel = models.model().params["norm"]["scale"]
    other = dataclasses.replace(
        models.model(),
        params={**models.model().params, "norm": {"scale": kernel.at[3].add(1e-6)}},
        source="another",
    )
    with pytest.raises(qj.QloraError, match="base tiny .fingerprint .*this is another .finger"):
        run(output, resume=True, model=other)
    with pytest.raises(qj.QloraError, match="trains on 12 examples .*these are 11"):
        run(output, resume=True, train=models.dataset(11))
    with pytest.raises(qj.QloraError) as refusal:
        run(output, resume=True, steps=8, learning_rate=1e-3, log_every=2, save_every=5)
    listed = str(refusal.value).splitlines()[1:]
    assert listed == ["  training.learning_rate: 0.01 -> 0.001", "  training.steps: 6 -> 8"]
    run(output, resume=True, log_every=2, save_every=5, keep=1, max_skipped=9)
    assert adapter(output) == adapter(whole)


def test_a_paged_optimizer_goes_on_to_the_bit(tmp_path):
    """In pages of some rows, as a large model's state is."""
    optimizer = qj.paged(optax.adamw(1e-2), 500)
    adapters = qj.lora.init(jax.random.key(1), models.model().params, CONFIG)
    assert any(isinstance(page, Cut) for page in optimizer.init(adapters).layout)
    run(tmp_path / "whole", optimizer=optimizer, steps=3)
    output = copy(tmp_path / "whole", tmp_path / "out", 2)
    run(output, resume=True, optimizer=optimizer, steps=3)
    assert adapter(output) == adapter(tmp_path / "whole")


def test_a_state_comes_back_on_another_mesh(tmp_path):
    """Bit for bit, in whichever kind of memory it is wanted."""
    devices = jax.devices()
    optimizer = optax.adamw(1e-3)
    adapters = qj.lora.init(jax.random.key(1), models.model().params, CONFIG)
    state = qj.TrainState.create(adapters, optimizer, jax.random.key(5))
    state = dataclasses.replace(state, step=jnp.int32(7))

    def on(count: int, kind: str) -> Any:
        mesh = jax.make_mesh((count,), ("x",), devices=devices[:count])

        def place(path: Any, leaf: Any) -> Any:
            axis = next((i for i, n in enumerate(leaf.shape) if n % count == 0), None)
            spec = (None,) * (axis or 0) + ("x",) if axis is not None else ()
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
            own = "opt_state" in jax.tree_util.keystr(path)
            return jax.device_put(leaf, sharding.with_memory_kind(kind) if own else sharding)

        return jax.tree_util.tree_map_with_path(place, state)

    with RunCheckpoints(tmp_path) as saved:
        saved.save(7, on(4, "device"), {"a": 1}, {"skipped": 2}, lambda folder: None)
    found = RunCheckpoints(tmp_path).newest()
    assert found is not None and (found.step, found.run, found.counts) == (
        7,
        {"a": 1},
        {"skipped": 2},
    )
    like = on(8, "pinned_host")
    restored = RunCheckpoints(tmp_path).restore(found, like)
    for a, b, c in zip(*map(jax.tree.leaves, (restored, like, state)), strict=True):
        assert a.sharding == b.sharding and a.dtype == c.dtype
        assert jax.typeof(a) == jax.typeof(b)  # the kind of memory, as a traced function sees it
        a, c = (
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in (a, c)
        )
        np.testing.assert_array_equal(np.asarray(a), np.asarray(c))
    # An optimizer that is paged from now on.
    like = qj.TrainState.create(adapters, qj.paged(optimizer, 500))
    restored = RunCheckpoints(tmp_path).restore(found, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    for a, b, c in zip(*map(jax.tree.leaves, (restored, like, state)), strict=True):
        assert a.sharding == b.sharding and a.shape == c.shape
    with pytest.raises(qj.QloraError, match="cannot be read as the state of this run"):
        RunCheckpoints(tmp_path).restore(found, dataclasses.replace(state, opt_state=()))
