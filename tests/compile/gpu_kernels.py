"""Compile the GPU kernels for one target, without the device, at the shapes of Llama 7B.

    python -m tests.compile.run COMPILERS gpu_kernels

A process each, because what the target cannot run aborts the process. A line each: how the work is
cut, seconds to compile, and what ptxas says: registers of a thread (as launched; the kernel then
shares them out anew) and bytes spilled, of which there must be none.
"""

import os
import re
import subprocess
import sys
import time

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))  # K x N
ROWS = (1, 16, 512, 4096)
BLOCK = 64


def compile_one(target: str, m: int, k: int, n: int, transposed: bool, dtype: str) -> None:
    """In the process of its own."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import gpu
    from pallas_kernels.gpu_tiles import choose
    from tests.compile.targets import TARGETS

    sharding = SingleDeviceSharding(TARGETS[target].device())
    shapes = [
        ((m, n if transposed else k), jnp.dtype(dtype)),
        ((k // 2, n), jnp.uint8),
        ((k // BLOCK, n), jnp.float32),
        ((16,), jnp.float32),
    ]
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    kernel = gpu.nf4_matmul_transposed if transposed else gpu.nf4_matmul
    start = time.perf_counter()
    compiled = jax.jit(lambda *a: kernel(*a, jnp.dtype(dtype))).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    assert "mosaic_gpu" in compiled.as_text()
    tiles = choose(m, k, n, BLOCK, transposed)
    once, each = tiles.shared(BLOCK)
    print(
        f"{tiles.m} rows x {tiles.contraction}, {tiles.splits} x {tiles.steps} steps, "
        f"{tiles.stages} stages in {(once + each * tiles.stages) >> 10} KiB, {seconds:.1f} s"
    )


def main(target: str) -> int:
    env = os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1"}
    start, failed = time.perf_counter(), 0
    cases = [(m, k, n, t, "bfloat16") for t in (0, 1) for k, n in SHAPES for m in ROWS]
    cases += [(100, 4096, 4160, t, "float16") for t in (0, 1)]  # ragged, and the other dtype
    for case in cases:
        m, k, n, transposed, dtype = case
        command = [sys.executable, "-m", "tests.compile.gpu_kernels", target, *map(str, case)]
        run = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        said = run.stdout + run.stderr
        registers = re.search(r"Used (\d+) registers", said)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        # ptxas falls back to one multiplication at a time where it cannot see that registers
        # are left alone meanwhile; correct, and too slow to ship unnoticed.
        serialized = "C7510" in said or "serialized" in said
        spills = sum(map(int, spilled.groups())) if spilled else None
        fine = run.returncode == 0 and registers and spills == 0 and not serialized
        failed += not fine
        name = f"M={m} {k}x{n} {'g W^T' if transposed else 'x W'} {dtype}: "
        if fine:
            result = next(line for line in said.splitlines() if " KiB" in line)
            print(f"{name}{result}; {registers[1]} registers, no spills", flush=True)
        else:
            why = f"{', wgmma serialized' * serialized}, {spills} bytes spilled"
            print(f"{name}FAILED{why}\n{said[-3000:]}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{target}: {len(cases) - failed} of {len(cases)} kernels compiled, {seconds:.0f} s")
    return failed


if __name__ == "__main__":
    if len(sys.argv) == 7:
        m, k, n, transposed = map(int, sys.argv[2:6])
        compile_one(sys.argv[1], m, k, n, bool(transposed), sys.argv[6])
    elif len(sys.argv) == 2:
        raise SystemExit(min(main(sys.argv[1]), 1))
    else:
        raise SystemExit(__doc__)
