"""Cycles of the TPU kernels as the compiler schedules them; needs no TPU.

    make compile            # once: installs the TPU compiler into .cache/compilers
    .venv/bin/python -m benchmarks.tpu_schedule

A TPU core issues one VLIW bundle a cycle, so the bundles of a grid step are its cycles, memory
stalls apart. Each kernel is compiled in a process of its own, which dumps the final schedule; the
peer is the same kernel fed with dense bf16 weights. `MXU` is the share of the matrix unit's issue
slots in use; `spills` counts stores and reloads of registers. For few rows the question is another:
whether a step takes fewer cycles than its codes and scales take to arrive from memory.
"""

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Memory bandwidth (bytes/s) and bf16 peak (operations/s) of one core, published by the maker, and
# products of a cycle: four matrix units of 128 x 128; on v6e two of 256 x 256, each of which takes
# two rows a cycle in the schedules. The clock follows: 1.05 GHz for v4, 1.5 for v5e, 1.75 for v5p
# and v6e. A v4 or v5p chip has two cores, which share its memory.
DEVICES = {
    "v4:2x2x1": (1228e9 / 2, 275e12 / 2, 4 * 128**2),
    "v5e:2x2": (819e9, 197e12, 4 * 128**2),
    "v5p:2x2x1": (2765e9 / 2, 459e12 / 2, 4 * 128**2),
    "v6e:2x2": (1640e9, 918e12, 4 * 256**2),
}
KERNELS = ("forward", "transposed", "dense", "dense transposed")
K = N = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compilers", type=Path, default=Path(".cache/compilers"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 512, 1024, 4096])
    parser.add_argument("--devices", nargs="+", default=list(DEVICES), choices=list(DEVICES))
    args = parser.parse_args()
    print("| device | M | kernel | cycles/step | of dense | of arrival | MXU | spills |")
    print("|---|---|---|---|---|---|---|---|")
    for device in args.devices:
        for rows in args.rows:
            found = {name: schedule(args.compilers, device, rows, name) for name in KERNELS}
            for name in ("forward", "transposed"):
                peer = found["dense" + name.removeprefix("forward").replace("trans", " trans")]
                print(row(device, rows, name, found[name], peer), flush=True)


def row(device: str, rows: int, name: str, ours: dict[str, Any], peer: dict[str, Any]) -> str:
    bandwidth, peak, products = DEVICES[device]
    clock = peak / (2 * products)
    # Of a whole weight of K x N, because the steps of the two may differ in size.
    cycles, dense = (x["bundles"] * x["steps"] for x in (ours, peer))
    passes = -(-rows // ours["tile_m"])
    arrival = passes * (K * N / 2 + K * N / 64 * 4) / (bandwidth / clock)
    share = ours["MATMUL"] / (ours["bundles"] * ours["capacity"])
    return (
        f"| {device.split(':')[0]} | {rows} | {name} | {ours['bundles']} | {cycles / dense:.2f} | "
        f"{cycles / arrival:.2f} | {share:.0%} | {ours['VSTORE:SPILL'] + ours['VLOAD:FILL']} |"
    )


def schedule(compilers: Path, device: str, rows: int, kernel: str) -> dict[str, Any]:
    """Compile one kernel in a process of its own and add up the schedule that it dumps."""
    from qlora_jax.plan.compilers import environment

    with tempfile.TemporaryDirectory() as folder:
        env = environment("tpu", compilers.resolve())
        env["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, "-m", "benchmarks.tpu_schedule", "--child"]
        out = subprocess.run(
            [*command, device, str(rows), kernel], env=env, check=True, stdout=subprocess.PIPE
        )
        steps, tile_m = (int(x) for x in out.stdout.split()[-2:])
        pattern = "*final_hlo-static-per-bundle-utilization.txt"
        text = max((f.read_text() for f in Path(folder).glob(pattern)), key=len)
    _, names, capacity, _, *lines = text.strip().splitlines()
    columns = [name.strip() for name in names.split(",")]
    totals = [sum(int(line.split()[i]) for line in lines) for i in range(len(columns))]
    slots = int(capacity.split()[columns.index("MATMUL")])
    measured = {"bundles": len(lines), "capacity": slots, "steps": steps, "tile_m": tile_m}
    return dict(zip(columns, totals, strict=True)) | measured


def child(device: str, rows: str, kernel: str) -> None:
    """Compile for `device`; print the number of grid steps and the rows of a step."""
    import math

    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental import topologies
    from jax.experimental.pallas import tpu as pltpu
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import tpu

    target = topologies.get_topology_desc(platform="tpu", topology_name=device).devices[0]
    sharding = SingleDeviceSharding(target)
    spec = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    generation = min(int(re.search(r"\d", device)[0]), max(tpu.GENERATIONS))
    transposed = kernel.endswith("transposed")
    x = spec((int(rows), K), jnp.bfloat16)
    weight = (spec((K // 2, N), jnp.uint8), spec((K // 64, N), jnp.float32))
    codebook = spec((16,), jnp.float32)

    tiles = []
    original = pl.pallas_call

    def recording(body: Any, **settings: Any) -> Any:
        x_tile, codes_tile = (s.block_shape for s in settings["in_specs"][:2])
        tiles.append((settings["grid"], x_tile[0], (2 * codes_tile[0], codes_tile[1])))
        return original(body, **settings)

    def ours(x: Any, *weight: Any) -> Any:
        product = tpu.nf4_matmul_transposed if transposed else tpu.nf4_matmul
        return product(x, *weight, jnp.bfloat16, target=generation)

    def dense(x: Any, w: Any) -> Any:
        grid, tile_m, tile_w = tiles[0]
        dims = (((1,), (1 if transposed else 0,)), ((), ()))

        def body(x_ref: Any, w_ref: Any, out_ref: Any, sum_ref: Any) -> None:
            step = pl.program_id(2)

            @pl.when(step == 0)
            def _() -> None:
                sum_ref[...] = jnp.zeros_like(sum_ref)

            sum_ref[...] += jax.lax.dot_general(
                x_ref[...], w_ref[...], dims, preferred_element_type=jnp.float32
            )

            @pl.when(step == pl.num_programs(2) - 1)
            def _() -> None:
                out_ref[...] = sum_ref[...].astype(out_ref.dtype)

        depth, width = reversed(tile_w) if transposed else tile_w
        of_weight = (lambda i, o, k: (o, k)) if transposed else (lambda i, o, k: (k, o))
        return original(
            body,
            grid=grid,
            in_specs=[
                pl.BlockSpec((tile_m, depth), lambda i, o, k: (i, k)),
                pl.BlockSpec(tile_w, of_weight),
            ],
            out_specs=pl.BlockSpec((tile_m, width), lambda i, o, k: (i, o)),
            out_shape=jax.ShapeDtypeStruct((x.shape[0], N), x.dtype),
            scratch_shapes=[pltpu.VMEM((tile_m, width), jnp.float32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=48 * 2**20 if generation > 4 else None,
            ),
        )(x, w)

    pl.pallas_call = recording
    lowered = jax.jit(ours).lower(x, *weight, codebook)
    if kernel.startswith("dense"):  # in the same tiles
        lowered = jax.jit(dense).lower(x, spec((K, N), jnp.bfloat16))
    lowered.compile()
    ((grid, tile_m, _),) = tiles
    print(math.prod(grid), tile_m)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        child(*sys.argv[2:])
    else:
        main()
