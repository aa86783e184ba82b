"""What a train step over many TPU chips holds and moves, from the compiled program; no chip needed.

    python -m benchmarks.mesh COMPILERS [CASE ...]

COMPILERS holds the folder `tpu`, as `make compile` installs it. For each case the whole LoRA step
is compiled, two examples for each part of the batch; printed are bytes per device and the
collectives of the program: how many, of which types, in the loops over layers and outside them.
"""

import collections
import dataclasses
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import qlora_jax as qj
from benchmarks import abstract
from qlora_jax.models import LlamaConfig
from qlora_jax.plan.compilers import environment
from qlora_jax.training.footprint import tree_bytes

LLAMA_65B = {
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_405B = {
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a slice of TPU chips. time: tokens of an example."""

    model: dict[str, int]
    topology: str
    mesh: str
    time: int = 512
    rank: int = 64


CASES = {
    "65B on v5p 2x2x1": Case(LLAMA_65B, "v5p:2x2x1", "fsdp=4"),
    "65B on v5e 4x4": Case(LLAMA_65B, "v5e:4x4", "fsdp=16"),
    "65B on v5e 4x4, tensor": Case(LLAMA_65B, "v5e:4x4", "fsdp=4,tensor=4"),
    "65B on v5p 4x4x4": Case(LLAMA_65B, "v5p:4x4x4", "fsdp=64"),
    "405B on v5p 4x4x4": Case(LLAMA_405B, "v5p:4x4x4", "fsdp=64"),
    "405B on v5p 4x8x8": Case(LLAMA_405B, "v5p:4x8x8", "fsdp=256"),
}

DUMP = "--xla_jf_dump_hlo_text=true --xla_jf_dump_llo_pass_label_regex=none --xla_jf_dump_to="
"""Flags of the compiler to write its programs into a folder: those for v5p `as_text` cannot print.
(Compiling takes several times as long with them.)"""

_COLLECTIVE = re.compile(
    r"= (?P<out>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
_ARRAY = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of a program. shapes: (type, dimensions) of what it gives; in_loop: in a loop's body."""

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    in_loop: bool

    @property
    def dtypes(self) -> str:
        return "+".join(sorted({dtype for dtype, _ in self.shapes}))


def collectives(program: str) -> list[Collective]:
    """Those in a compiled program's text; each once, though on a TPU several fusions share one."""
    found: dict[str, Collective] = {}
    for number, line in enumerate(program.splitlines()):
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        shapes = tuple(
            (dtype, tuple(int(size) for size in sizes.split(",") if size))
            for dtype, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", match["out"]))
        )
        channel = re.search(r"channel_id=(\d+)", line)
        name = re.search(r'op_name="([^"]*)"', line)
        in_loop = name is not None and "while/body" in name[1]
        key = channel[1] if channel else f"line {number}"
        found.setdefault(key, Collective(match["kind"], shapes, in_loop))
    return list(found.values())


def moved_dense(found: list[Collective], params: Any) -> list[Collective]:
    """Collectives that give a weight of the base as numbers, not as codes: there should be none.

    A weight is known by the shape of one of its layers, or of a device's part of it; what has as
    many rows and columns and is no weight is an activation of just these sizes, so that a caller
    should choose others. params: shapes or arrays with shardings.
    """
    shapes = set()
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, qj.QuantizedArray)):
        if leaf.ndim > 1:
            four_bit = isinstance(leaf, qj.QuantizedArray)
            stored = leaf.codes if four_bit else leaf
            k, n = stored.sharding.shard_shape(stored.shape)[-2:]
            shapes |= {tuple(leaf.shape[-2:]), (2 * k if four_bit else k, n)}
    return [
        one
        for one in found
        if any(
            dtype != "u8" and tuple(size for size in dims if size > 1)[-2:] in shapes
            for dtype, dims in one.shapes
        )
    ]


def compile_step(config: LlamaConfig, topology: str, mesh: str, time: int, rank: int) -> Any:
    """(compiled step, (state, params, batch) as shapes with shardings)."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    layout = qj.Layout.of(qj.make_mesh(mesh, devices), config)
    step, (state, params, batch) = abstract.train_step(
        config, batch=2 * layout.row_parts, time=time, rank=rank, dtype=jnp.bfloat16
    )
    placed = layout.state(state), layout.params(params), layout.batch(batch)
    with qj.use_implementation("pallas_tpu"), qj.use_attention("splash"):
        return step.lower(*placed).compile(), placed


def main(name: str, dump: Path) -> None:
    """Prints a case's row and collectives; dump: the folder of `DUMP`."""
    case = CASES[name]
    config = LlamaConfig.from_hf({"model_type": "llama", **case.model})
    start = time.perf_counter()
    compiled, (state, params, _) = compile_step(
        config, case.topology, case.mesh, case.time, case.rank
    )
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    gib = 2**30
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    print(
        f"| {name} | {case.mesh} | {tree_bytes(params) / gib:.2f} | {tree_bytes(state) / gib:.2f} "
        f"| {memory.temp_size_in_bytes / gib:.2f} | {peak / gib:.2f} | {seconds:.0f} |"
    )
    (program,) = dump.glob("*-TLP-hlo.txt")
    found = collectives(program.read_text())
    counts = collections.Counter((c.in_loop, c.kind, c.dtypes) for c in found)
    for (in_loop, kind, dtypes), count in sorted(counts.items()):
        print(f"  {'in loops' if in_loop else 'once'}: {count} {kind} of {dtypes}")
    for one in moved_dense(found, params):
        print(f"  MOVES A DENSE WEIGHT: {one}")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        main(sys.argv[2], Path(sys.argv[3]))
        raise SystemExit
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    print("| model and slice | mesh | base GiB | state GiB | temporaries | in all | compiled, s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failed = 0
    for case in sys.argv[2:] or CASES:
        with tempfile.TemporaryDirectory() as dump:
            command = [sys.executable, "-m", "benchmarks.mesh", "--case", case, dump]
            env = environment("tpu", Path(sys.argv[1]).resolve())
            env["LIBTPU_INIT_ARGS"] = DUMP + dump
            failed += subprocess.run(command, env=env, check=False).returncode != 0
    raise SystemExit(failed)
