"""Real processes on the loopback, found through jax.distributed."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.parallel import distributed

ROOT = Path(__file__).resolve().parents[2]


def launch(arguments: Sequence[str], processes: int) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` in so many processes, a device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
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
                [sys.executable, *arguments],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return running


def finish(running: Sequence[subprocess.Popen[str]]) -> list[str]:
    """What each process printed; all must exit 0."""
    try:
        said = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(said)
    return said
