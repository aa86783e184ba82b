"""Where the state of an optimizer is, seen by compilers for devices that need not be there.

    python -m benchmarks.paged COMPILERS [--hidden 4096] [--layers 32] [--rank 64]

COMPILERS holds the folders that `make compile` installs. The optimizer's update of adapters on all
linear weights of a Llama, plain and paged, is compiled for each target in a process of its own. The
table: MiB of state on the device and on the host between steps; the compiler's temporaries; and how
many copies between host and device the program starts without waiting for them.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qlora_jax as qj
from benchmarks import abstract
from qlora_jax import models
from qlora_jax.parallel.rules import in_host_memory
from qlora_jax.plan.compilers import environment
from qlora_jax.plan.worker import compile_lowered, lower
from qlora_jax.training.paged import PAGE_BYTES
from qlora_jax.training.settings import TrainSettings
from tests.compile.targets import TARGETS

SHOWN = ("TPU v5e", "RTX A6000", "H200")
CASES = [TrainSettings(optimizer=name, paged=paged) for name, paged in (
    ("adamw", False), ("adamw", True), ("adamw8bit", False), ("adamw8bit", True),
    ("lion", True), ("adafactor", True),
)]  # fmt: skip
MIB = 2**20
# A copy's beginning: by itself on a TPU, as a fusion that starts on a GPU.
START = re.compile(r" (?:copy|dynamic-slice|dynamic-update-slice|fusion|async)-start\(")


def compiled(target: Any, step: Any, arguments: Any, place: Callable[[Any], Any]) -> Any:
    """(memory statistics, program) of a jitted step whose arguments may be in host memory.

    arguments: a tuple of trees of shapes; place: a sharding of the device -> shardings for them. A
    GPU that is not there has no memories to name: for it the step is lowered on a CPU, which has,
    with a GPU's rules, and given to its compiler.
    """
    device, gpu = target.device(), target.compiler == "gpu"
    mesh = jax.sharding.Mesh(np.array([jax.devices("cpu")[0] if gpu else device]), ("x",))
    shardings = place(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arguments, shardings
    )
    memory, text = compile_lowered(lower(step, placed, target), target)
    return memory, text()


def measure(
    target: str, case: TrainSettings, *, hidden: int, layers: int, rank: int
) -> tuple[int, int, int, str]:
    """Of a compiled update: bytes of state on the device, on the host, of temporaries; its text."""
    params = qj.quantize_tree(models.abstract_params(abstract.config(layers, hidden)), qj.NF4())
    adapters = jax.eval_shape(
        lambda key: qj.lora.init(key, params, qj.LoraConfig(rank=rank)), jax.random.key(0)
    )
    optimizer = case.make_optimizer(1000)
    state = jax.eval_shape(optimizer.init, adapters)

    def place(sharding: Any) -> Any:
        here = jax.tree.map(lambda _: sharding, adapters)
        there = in_host_memory(state, jax.tree.map(lambda _: sharding, state))
        return here, there, here

    # Gradients become the updates, state is replaced: both are donated.
    step = jax.jit(optimizer.update, donate_argnums=(0, 1), keep_unused=True)
    memory, program = compiled(TARGETS[target], step, (adapters, state, adapters), place)
    weights = 2 * sum(x.size * 4 for x in jax.tree.leaves(adapters))
    on_device = memory.argument_size_in_bytes - weights
    return on_device, memory.host_argument_size_in_bytes, memory.temp_size_in_bytes, program


def main(target: str, hidden: int, layers: int, rank: int) -> None:
    """Prints a row of the table for each optimizer."""
    for case in CASES:
        began = time.perf_counter()
        *sizes, program = measure(target, case, hidden=hidden, layers=layers, rank=rank)
        seconds = time.perf_counter() - began
        name = case.optimizer + (", paged" if case.paged else "")
        print(
            f"| {target} | {name} | {' | '.join(f'{size / MIB:.1f}' for size in sizes)} "
            f"| {len(START.findall(program))} | {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("compilers", type=Path)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--target", choices=SHOWN)
    options = parser.parse_args()
    if options.target:
        main(options.target, options.hidden, options.layers, options.rank)
        raise SystemExit
    print(f"pages of {PAGE_BYTES / MIB:.0f} MiB")
    print("| target | optimizer | state on device | on host | temporaries | copies | compile, s |")
    print("|---|---|---|---|---|---|---|")
    for target in SHOWN:
        name = TARGETS[target].compiler
        command = [sys.executable, "-m", "benchmarks.paged", *sys.argv[1:], "--target", target]
        env = environment(name, options.compilers.resolve())
        subprocess.run(command, env=env, check=True)
