"""Compile a small whole LoRA train step for one device of targets.py and print its memory.

    python -m tests.compile.train_step "TPU v5e"

`tests.compile.run` sets the environment that the compilers need.
"""

import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import qlora_jax as qj
from benchmarks import abstract
from tests.compile.targets import TARGETS

# What the device is for, and once XLA's own operations on a GPU.
IMPLEMENTATIONS = {
    "tpu": ("pallas_tpu",),
    "RTX A6000": ("xla", "cuda"),
    "H200": ("cuda", "pallas_gpu"),
}


def main(name: str) -> None:
    target = TARGETS[name]
    sharding = SingleDeviceSharding(target.device())
    if target.compiler == "gpu":
        # Loads on a machine without a GPU; XLA asks for the handlers when it compiles.
        from qlora_cuda import library

        library.register(library.PATH)
    config = abstract.config(layers=4)
    for implementation in IMPLEMENTATIONS[name if target.compiler == "gpu" else "tpu"]:
        step, arguments = abstract.train_step(config, batch=2, time=512, dtype=jnp.bfloat16)
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
        )
        start = time.perf_counter()
        with qj.use_implementation(implementation):
            memory = step.lower(*placed).compile().memory_analysis()
        seconds = time.perf_counter() - start
        arguments_mib, temporary_mib = (
            size / 2**20 for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
        )
        print(
            f"{name}, {implementation}: compiled in {seconds:.1f} s; "
            f"arguments {arguments_mib:.0f} MiB, temporaries {temporary_mib:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1])
