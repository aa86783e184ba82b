"""Compile the TPU kernels for one generation at the shapes of LLaMA 7B, 13B and 65B.

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

from pallas_kernels import tpu
from tests.compile.targets import TARGETS

WIDTHS = {"7B": (4096, 11008), "13B": (5120, 13824), "65B": (8192, 22016)}
ROWS = (1, 64, 512, 4096)


def main(name: str) -> None:
    sharding = SingleDeviceSharding(TARGETS[name].device())
    generation = min(int(name.split(" v")[1][0]), max(tpu.GENERATIONS))
    start, count = time.perf_counter(), 0
    for model, rows in itertools.product(WIDTHS.values(), ROWS):
        d, f = model
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
    print(f"{name}: {count} kernels compiled in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1])
