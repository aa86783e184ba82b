"""Compile the TPU kernels for one TPU at the shapes of LLaMA 7B, 13B and 65B.

    python -m tests.compile.tpu_kernels "TPU v5e"

`tests.compile.run` sets the environment that the compiler needs. Compiling is also the check of
memory: Mosaic refuses a kernel whose buffers do not fit into VMEM.
"""

import itertools
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from pallas_kernels import tpu, tpu_scales
from tests.compile.targets import TARGETS

WIDTHS = {"7B": (4096, 11008), "13B": (5120, 13824), "65B": (8192, 22016)}
ROWS = (1, 16, 512, 4096)
LARGEST = {"65B": WIDTHS["65B"]}
BY_SIZE = ("TPU v4", "TPU v5p")
"""Get the largest weights only, as a check of memory: their kernels are v5e's or nearly so."""
MOST = (64,)  # rows with which the kernel for few takes most memory: with the largest weights


def main(name: str) -> None:
    sharding = SingleDeviceSharding(TARGETS[name].device())
    generation = min(int(name.split(" v")[1][0]), max(tpu.GENERATIONS))
    start, count = time.perf_counter(), 0
    widths = LARGEST if name in BY_SIZE else WIDTHS
    cases = [*itertools.product(widths.values(), ROWS), *((WIDTHS["65B"], m) for m in MOST)]
    for (d, f), rows in cases:
        for (k, n), transposed in itertools.product([(d, d), (d, f), (f, d)], [False, True]):
            shapes = [
                ((rows, n if transposed else k), jnp.bfloat16),
                ((k // 2, n), jnp.uint8),
                ((k // 64, n), jnp.float32),
                ((16,), jnp.float32),
            ]
            arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
            kernel = tpu.nf4_matmul_transposed if transposed else tpu.nf4_matmul

            def run(*a, kernel=kernel):
                return kernel(*a, jnp.bfloat16, target=generation)

            jax.jit(run).lower(*arguments).compile()
            count += 1
    for d, f in widths.values():
        scales = jax.ShapeDtypeStruct((f // 64, d), jnp.uint8, sharding=sharding)
        levels = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=sharding)
        jax.jit(tpu_scales.look_up).lower(levels, scales).compile()
        count += 1
    print(f"{name}: {count} kernels compiled in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1])
