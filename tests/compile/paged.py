"""A paged optimizer's state: none of it on the device between steps, two pages while it is updated.

    python -m tests.compile.paged "TPU v5e"

`tests.compile.run` sets the environment that the compiler needs.
"""

import sys

from benchmarks.paged import MIB, measure
from qlora_jax.training.paged import PAGE_BYTES
from qlora_jax.training.settings import OptimizerName, TrainSettings

STATE: dict[OptimizerName, int] = {"adamw": 1200, "adamw8bit": 300, "lion": 600}
"""MiB that each has at least, on the host."""


def main(target: str) -> None:
    for optimizer, least in STATE.items():
        case = TrainSettings(optimizer=optimizer, paged=True)
        device, host, temporary, _ = measure(target, case, hidden=4096, layers=32, rank=64)
        print(
            f"{target}, {optimizer} paged: {device / MIB:.0f} MiB of state on the device, "
            f"{host / MIB:.0f} on the host, {temporary / MIB:.0f} of temporaries",
            flush=True,
        )
        assert host > least * MIB and device == 0 and temporary <= 2 * PAGE_BYTES + MIB


if __name__ == "__main__":
    main(sys.argv[1])
