"""Compile the train step and the kernels for every target, each in a process of its own.

    python -m tests.compile.run COMPILERS [PROGRAM]

PROGRAM: only this one of train_step, attention, tpu_kernels, gpu_kernels, plan, memory, mesh,
paged and recipes. COMPILERS holds the folders `tpu` (libtpu), `gpu` (JAX's CUDA plugin, ptxas) and
`cuda` (qlora-jax-cuda) as `make compile` installs them. A process each, because what a target
cannot compile may abort the process.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qlora_jax.plan.compilers import environment
from tests.compile.targets import TARGETS

PROGRAMS = {
    "tpu": ("train_step", "attention", "tpu_kernels", "mesh", "paged", "recipes"),
    "gpu": ("train_step", "attention", "gpu_kernels", "plan", "memory", "paged", "recipes"),
}
TPUS = [name for name, target in TARGETS.items() if target.compiler == "tpu"]
ONCE = ("mesh", "paged", "recipes")
SKIPPED = (
    ("train_step", "TPU v4"),  # without a device, a step is compiled with kernels of v5 and later
    ("attention", "TPU v7x"),  # it compiles, but its compiler cannot print the program to be read
    ("tpu_kernels", "TPU v7x"),  # they are v6e's; the train step shows that they compile
    ("gpu_kernels", "RTX A6000"),  # they are Hopper's
    ("plan", "H200"),  # one is enough
    ("memory", "H200"),  # it has three times as much
    # These are the same for all TPUs.
    *((program, name) for program in ONCE for name in TPUS if name != "TPU v5e"),
    ("recipes", "H200"),  # each recipe names its device
)

PARALLEL = 2  # a compilation takes about one core


def main(compilers: Path, only: str | None = None) -> int:
    jobs = [
        (name, program)
        for name, target in TARGETS.items()
        for program in PROGRAMS[target.compiler]
        if (program, name) not in SKIPPED and only in (None, program)
    ]

    def compiles(job: tuple[str, str]) -> bool:
        name, program = job
        compiler = TARGETS[name].compiler
        env = environment(compiler, compilers.resolve())
        command = [sys.executable, "-m", f"tests.compile.{program}", name]
        return subprocess.run(command, env=env, check=False).returncode == 0

    with ThreadPoolExecutor(PARALLEL) as pool:
        fine = list(pool.map(compiles, jobs))
    failed = [
        f"{name} ({program})" for (name, program), ok in zip(jobs, fine, strict=True) if not ok
    ]
    if failed:
        print(f"did not compile for: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    raise SystemExit(main(Path(sys.argv[1]), *sys.argv[2:]))
