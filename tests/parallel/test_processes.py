"""Real processes on the loopback, found through jax.distributed: the losses of one process."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.parallel import distributed
from tests.parallel.launch import finish, launch
from tests.tiny import write_checkpoint

STEPS = "300"
COMMAND = "from qlora_jax.cli import main; main()"


def start(folder: Path, output: Path, processes: int, *options: str) -> list[subprocess.Popen[str]]:
    """`qlora-jax train` in so many processes, a device each."""
    arguments = [
        *("-c", COMMAND, "train", "--model", str(folder / "model")),
        *("--data", str(folder / "rows.jsonl"), "--output", str(output)),
        *("--lora.targets", "q_proj", "down_proj", "--eval-count", "2"),
        *("--training.steps", "3", "--training.batch-size", "4", *options),
    ]
    return launch(arguments, processes)


def train(folder: Path, output: Path, processes: int, *options: str) -> list[str]:
    """As `start`, to the end."""
    return finish(start(folder, output, processes, *options))


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [line.get("loss", line.get("eval_loss")) for line in metrics(output)]


def prepare(folder: Path) -> None:
    write_checkpoint(folder / "model", hidden=128, intermediate=256)
    rows = [{"prompt": f"say {i}", "completion": f"{i} and {i}"} for i in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path: Path) -> None:
    """Saved, exit 0; and gone on from, every step once."""
    prepare(tmp_path)
    output, options = tmp_path / "out", ("--mesh", "fsdp=2", "--training.steps", STEPS)
    running = start(tmp_path, output, 2, *options)
    while not (output / "metrics.jsonl").exists() or len(losses(output)) < 3:
        assert running[0].poll() is None, finish(running)
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    said = finish(running)
    stopped = max(int(path.name.removeprefix("step-")) for path in output.glob("step-*"))
    assert f"interrupted after step {stopped} (SIGTERM)" in said[0] and stopped < int(STEPS)
    train(tmp_path, output, 2, *options, "--resume")
    steps = [line["step"] for line in metrics(output) if "loss" in line]
    assert steps == list(range(1, int(STEPS) + 1))


@pytest.mark.slow
def test_losses_are_those_of_one_process(tmp_path: Path) -> None:
    """Loading in parts, training, evaluation, the saved adapter; the first process alone speaks."""
    prepare(tmp_path)
    train(tmp_path, tmp_path / "one", 1)
    for processes, mesh in ((2, "fsdp=2"), (4, "fsdp=2,tensor=2")):
        output = tmp_path / str(processes)
        said = train(tmp_path, output, processes, "--mesh", mesh)
        np.testing.assert_allclose(losses(output), losses(tmp_path / "one"), atol=1e-5, rtol=0)
        assert "parameters trained" in said[0]
        assert not any("parameters trained" in other for other in said[1:])
    model = qj.load(tmp_path / "model", quantization=qj.NF4())
    one, four = (qj.peft.load(tmp_path / name, model)[0] for name in ("one", "4"))
    for path, adapter in one.items():
        np.testing.assert_allclose(adapter.b, four[path].b, atol=1e-5)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({distributed.ADDRESS: "10.0.0.1:1234"}, True),
    ],
)
def test_what_the_environment_says(environment: dict[str, str], expected: bool) -> None:
    assert distributed.several(environment) is expected


def test_numbers_that_are_none() -> None:
    environment = {distributed.ADDRESS: "h:1", distributed.COUNT: "2"}
    with pytest.raises(qj.QloraError, match="JAX_PROCESS_ID must be whole numbers, not '2' and No"):
        distributed.join(environment)
