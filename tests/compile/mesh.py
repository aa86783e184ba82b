"""Compile a small LoRA train step for 16 chips and look at what it moves between them.

    python -m tests.compile.mesh "TPU v5e"

`tests.compile.run` sets the environment that the compiler needs. benchmarks/mesh.py does it for
large models.
"""

import sys
import time

import jax

from benchmarks import abstract
from benchmarks.mesh import collectives, compile_step, moved_dense
from qlora_jax.training.footprint import tree_bytes

MESH, TOPOLOGY, TIME = "fsdp=8,tensor=2", "4x4", 192


def main(name: str) -> None:
    topology = f"{name.removeprefix('TPU ')}:{TOPOLOGY}"
    config = abstract.config(layers=4)
    start = time.perf_counter()
    compiled, (_, params, _) = compile_step(config, topology, MESH, TIME, rank=16)
    seconds = time.perf_counter() - start
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    part = tree_bytes(params)
    found = collectives(compiled.as_text())
    codes = sum(one.kind == "all-gather" and one.dtypes == "u8" for one in found)
    print(
        f"{name} x 16, {MESH}: compiled in {seconds:.1f} s; {part / whole:.3f} of the base on "
        f"each, {codes} all-gathers of codes and scales among {len(found)} collectives",
        flush=True,
    )
    assert not moved_dense(found, params), moved_dense(found, params)
    assert codes and part < 1.1 * whole / 16


if __name__ == "__main__":
    main(sys.argv[1])
