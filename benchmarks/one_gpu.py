"""LLaMA 7B to 65B trained on the one GPU at hand, in as much of its memory as is said.

    python -m benchmarks.one_gpu [--pool 46] [--cases 65B:1x512:paged 65B:1x2048:paged]

The step is the one that `qlora-jax train` runs: NF4 with double quantization, rank 64 on all linear
layers, AdamW, bf16. Weights are random 4-bit codes and scales, made on the device; every token is
labelled, and the batch is the same in every step. A case is MODEL:BxT and, after another colon,
what is not as usual: `paged`, or a remat policy (usual: full), or both. Each runs in a process of
its own, of whose device JAX takes no more than --pool GiB.

peak      of the pool, as JAX's allocator counts it, from before the weights were made on
compile   seconds of the first step
host      GiB/s from pinned host memory and back, of arrays of 64 MiB: what paging has to live on
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from typing import Any

from benchmarks.children import ask
from benchmarks.memory import GIB, MODELS, workload

USUAL = ("65B:1x512:offload", "65B:1x512:paged", "65B:1x2048:paged")
WARM_UP = 2


# JAX is imported where a case runs: the process that starts them leaves the device to them.


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to be measured, and MODEL:BxT[:WORD...] that names it."""

    text: str
    model: str
    batch: int
    time: int
    paged: bool
    remat: Any

    @classmethod
    def parse(cls, text: str) -> "Case":
        model, shape, *words = text.split(":")
        if model not in MODELS:
            raise argparse.ArgumentTypeError(f"{model!r}: expected one of {', '.join(MODELS)}")
        batch, time = map(int, shape.split("x"))
        policies = [word for word in words if word != "paged"] or ["full"]
        return cls(text, model, batch, time, "paged" in words, policies[0])


def random_params(abstract: Any, key: Any) -> Any:
    """Parameters of those shapes on the default device: matrices and embeddings of deviation 0.02,
    norms of ones. A layer at a time, as random bits take several times the room of 4-bit codes."""
    import jax
    import jax.numpy as jnp

    from qlora_jax.quant import QuantizedArray

    def draw(x: Any, key: Any, make: Any) -> Any:
        if len(x.shape) < 3:
            return jax.jit(functools.partial(make, shape=x.shape, dtype=x.dtype))(key)
        one = functools.partial(make, shape=x.shape[1:], dtype=x.dtype)
        return jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(key, x.shape[0]))

    def normal(key: Any, shape: Any, dtype: Any) -> Any:
        return 0.02 * jax.random.normal(key, shape, dtype)

    def leaf(path: Any, x: Any) -> Any:
        here = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        if isinstance(x, QuantizedArray):
            # A level's deviation is 0.55 of absmax, and absmax is offset + nested * [-1, 1].
            return dataclasses.replace(
                x,
                codes=draw(x.codes, here, jax.random.bits),
                scales=draw(x.scales, jax.random.fold_in(here, 1), jax.random.bits),
                nested=jnp.full(x.nested.shape, 0.01, x.nested.dtype),
                offset=jnp.full(x.offset.shape, 0.036, x.offset.dtype),
            )
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones(x.shape, x.dtype)
        return draw(x, here, normal)

    is_leaf = lambda x: isinstance(x, QuantizedArray)  # noqa: E731
    return jax.tree_util.tree_map_with_path(leaf, abstract, is_leaf=is_leaf)


def copy_rates() -> list[float]:
    """Bytes a second from the host and to it."""
    import jax
    import jax.numpy as jnp

    here = jnp.zeros(2**24, jnp.float32)
    device = here.sharding
    there = jax.device_put(here, device.with_memory_kind("pinned_host"))
    rates = []
    for x, where in ((there, device), (here, device.with_memory_kind("pinned_host"))):
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            jax.block_until_ready(jax.device_put(x, where))
            seconds.append(time.perf_counter() - start)
        rates.append(x.nbytes / min(seconds))
    return rates


def child(case: Case, steps: int, attention: Any) -> dict[str, Any]:
    """One case, in this process."""
    import jax
    import jax.numpy as jnp

    import qlora_jax as qj
    from qlora_jax.models.attention import use_attention
    from qlora_jax.plan import abstract

    work = workload(case.model, case.time, paged=case.paged, remat=case.remat)
    work = work.with_training(batch_size=case.batch)
    planned = abstract.of_workload(work)
    params = random_params(planned.model.params, jax.random.key(0))
    optimizer = work.training.make_optimizer(1000)
    # Nobody else holds the adapters: see `TrainState.create`.
    state = qj.TrainState.create(
        qj.lora.init(jax.random.key(1), params, work.lora), optimizer, jax.random.key(2)
    )
    shape = (case.batch, case.time)
    ids = jax.random.randint(jax.random.key(3), shape, 0, work.config().vocab_size, jnp.int32)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": jnp.ones_like(ids)}
    seconds, losses = [], []
    with use_attention(attention):
        for _ in range(WARM_UP + steps):
            start = time.perf_counter()
            state, metrics = planned.step(state, params, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - start)
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "kind": f"{jax.local_devices()[0].device_kind}, JAX {jax.__version__}",
        "compile": seconds[0],
        "seconds": statistics.median(seconds[WARM_UP:]),
        "losses": [losses[0], losses[-1]],
        "peak": memory.get("peak_bytes_in_use", 0),
        "pool": memory.get("bytes_limit", 0),
        "rates": copy_rates() if case.paged else None,
    }


def device_bytes() -> int:
    """Of the first NVIDIA GPU, as its driver says."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return int(text.split()[0]) * 2**20


def run(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """`child` in a fresh interpreter with a pool of its own."""
    fraction = options.pool * GIB / device_bytes()
    env = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.4f}",
    }
    how = ["--child", case.text, "--steps", str(options.steps)]
    how += ["--attention", options.attention] if options.attention else []
    return ask("benchmarks.one_gpu", *how, env=env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--cases",
        nargs="+",
        type=Case.parse,
        default=[Case.parse(text) for text in USUAL],
        metavar="MODEL:BxT[:paged]",
    )
    parser.add_argument("--pool", type=float, default=46.0, help="GiB of the device for JAX")
    parser.add_argument("--attention", help="xla or cudnn (default: the platform's)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process")
    parser.add_argument("--child", type=Case.parse, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.steps, options.attention)))
        return

    print(
        "| LLaMA | batch | AdamW | remat | tokens/s | s a step | peak GiB | of a pool of ", end=""
    )
    print("| host, GiB/s | compile, s | loss, first and last |")
    print("|---" * 11 + "|")
    for case in options.cases:
        found = run(case, options)
        paging = "paged" if case.paged else "on the device"
        label = f"| {case.model} | {case.batch} x {case.time} | {paging} | {case.remat} |"
        if "failed" in found:
            print(f"{label} {found['failed']} | | | | | | |", flush=True)
            continue
        rates = " / ".join(f"{rate / GIB:.0f}" for rate in found["rates"] or ()) or "-"
        first, last = found["losses"]
        print(
            f"{label} {case.batch * case.time / found['seconds']:.0f} | {found['seconds']:.3f} | "
            f"{found['peak'] / GIB:.2f} | {found['pool'] / GIB:.2f} | {rates} | "
            f"{found['compile']:.0f} | {first:.3f}, {last:.3f} |",
            flush=True,
        )
        print(found["kind"], file=sys.stderr)


if __name__ == "__main__":
    main()
