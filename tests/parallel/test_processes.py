"""Real processes on the loopback, found through jax.distributed: the losses of one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.parallel import distributed
from tests.tiny import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS = "300"
COMMAND = "from qlora_jax.cli import main; main()"


def start(folder: Path, output: Path, processes: int, *options: str) -> list[subprocess.Popen[str]]:
    """`qlora-jax train` in so many processes, a device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [
        *("train", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")),
        *("--output", str(output), "--lora.targets", "q_proj", "down_proj", "--eval-count", "2"),
        *("--training.steps", "3", "--training.batch-size", "4", *options),
    ]
    running = []
    for number in range(processes):
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        # Between processes the CPU's collectives have no order of their own: those of two steps
        # under way at once can wait for each other.
        env["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        if processes > 1:
            env |= {distributed.ADDRESS: address, distributed.COUNT: str(processes)}
            env[distributed.NUMBER] = str(number)
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", COMMAND, *arguments],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return running


def finish(running: list[subprocess.Popen[str]]) -> list[str]:
    """What each process printed; all must exit 0."""
    try:
        said = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(said)
    return said


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
