"""Compile a small whole LoRA train step for one device of targets.py and print its memory.

    python -m tests.compile.train_step "TPU v5e"

`tests.compile.run` sets the environment that the compilers need.
"""

import contextlib
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import qlora_jax as qj
from benchmarks import abstract
from tests.compile.targets import TARGETS

# Where the platform has kernels of its own, the step is compiled with them.
KERNELS = {"tpu": qj.use_implementation("pallas_tpu")}


def main(name: str) -> None:
    sharding = SingleDeviceSharding(TARGETS[name].device())
    config = abstract.config(layers=4)
    step, arguments = abstract.train_step(config, batch=2, time=512, dtype=jnp.bfloat16)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    start = time.perf_counter()
    with KERNELS.get(TARGETS[name].compiler, contextlib.nullcontext()):
        memory = step.lower(*placed).compile().memory_analysis()
    seconds = time.perf_counter() - start
    arguments_mib, temporary_mib = (
        size / 2**20 for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    )
    print(
        f"{name}: compiled in {seconds:.1f} s; "
        f"arguments {arguments_mib:.0f} MiB, temporaries {temporary_mib:.0f} MiB"
    )


if __name__ == "__main__":
    main(sys.argv[1])
