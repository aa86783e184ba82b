"""LLaMA-65B's whole train step fits on one 48 GB GPU, by that GPU's compiler: the paper's headline.

    python -m tests.compile.memory "RTX A6000"

`tests.compile.run` sets the environment that the compiler needs.
"""

import sys

from benchmarks.memory import GIB, workload
from qlora_jax.plan.worker import compile_step
from tests.compile.targets import TARGETS

BOUNDS = (
    (workload("65B", 512, remat="offload"), 45.0),
    (workload("65B", 512, paged=True), 41.0),
    (workload("65B", 2048, paged=True), 44.0),
)
"""Steps, and the GiB that each may take; the card has 47.5, less half a one for CUDA's context."""


def main(name: str) -> int:
    over = 0
    for step, bound in BOUNDS:
        answer = compile_step(step, TARGETS[name])
        total = (answer["arguments"] + answer["outputs"] + answer["temporaries"]) / GIB
        over += total > bound
        codes = f"{answer['implementation']}, attention by {answer['attention']}"
        print(
            f"{name}, LLaMA-65B, {step.time} tokens, remat={step.training.remat}, AdamW "
            f"{'paged' if step.training.paged else 'on the device'}, {codes}: "
            f"{total:.2f} GiB of at most {bound}; compiled in {answer['seconds']:.0f} s",
            flush=True,
        )
    return over


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
