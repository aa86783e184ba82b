"""Compile the step of every recipe of examples/ at its real size: it fits the device it is for.

    python -m tests.compile.recipes "RTX A6000"

Those for GPUs, whichever is named, or those for TPUs. `tests.compile.run` sets the environment that
the compiler needs.
"""

import json
import sys
import tempfile
from pathlib import Path

from qlora_jax.commands.plan import Plan
from qlora_jax.plan.devices import find
from qlora_jax.plan.report import gib
from qlora_jax.plan.worker import compile_step
from qlora_jax.training.footprint import Footprint
from tests.compile.plan import TOLERANCE
from tests.compile.targets import TARGETS
from tests.recipes import DEVICES, EXAMPLES, real

SMALL = 2**28
"""Bytes by which the formula may be off in any case: what a compiler adds to a small step."""


def main(target: str) -> int:
    wrong = 0
    for name, wanted in DEVICES.items():
        device = find(wanted)
        if device.compiler != TARGETS[target].compiler:
            continue
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(real(name)))
            recipe = EXAMPLES / f"{name}.yaml"
            workload = Plan(model=folder, device=wanted, recipe=recipe).workload(device.count)
        answer = compile_step(workload, device)
        total = answer["arguments"] + answer["outputs"] + answer["temporaries"]
        estimated = Footprint(**answer["estimate"]).total
        print(
            f"{name}: {gib(total)} of {gib(device.room)} on {device.title}, compiled in "
            f"{answer['seconds']:.0f} s; by formula {estimated / total - 1:+.1%}",
            flush=True,
        )
        wrong += total > device.room or abs(estimated - total) > max(TOLERANCE * total, SMALL)
    return wrong


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
