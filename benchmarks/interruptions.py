"""Runs killed at random moments and resumed: do all end in the same adapter, byte for byte?

    python -m benchmarks.interruptions [--runs 50] [--seed 0]

Each run is a process of its own that saves after every step. It is killed (SIGKILL) somewhere
within a step drawn at random, resumed, perhaps killed again, and at last resumed to its end. Then
its adapter and its loss curve are compared with those of a run that nobody killed. Programs are
compiled once, into JAX's persistent cache, and the library is imported once, by a server from which
processes are forked before they have a backend.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

STEPS = 12
CLOCK = {"seconds", "input_seconds", "tokens_per_second", "memory_bytes"}
CONTEXT = multiprocessing.get_context("forkserver")


def train(output: str, cache: str, fill: bool) -> None:
    """Begins or resumes the run in `output`. fill: compiled programs are added to the cache; not by
    a process that may be killed meanwhile, since an entry is not written at one stroke."""
    import jax
    import numpy as np

    import qlora_jax as qj
    from benchmarks.abstract import config as make_config
    from qlora_jax import models
    from qlora_jax.data import TokenizedDataset, TokenizedExample
    from qlora_jax.training.settings import TrainSettings
    from qlora_jax.training.trainer import fit

    jax.config.update("jax_compilation_cache_dir", cache)
    least = 0.0 if fill else 1e9
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    config = make_config(2, 64, 256)
    params = qj.quantize_tree(models.init_params(config, jax.random.key(0)), qj.NF4())
    model = qj.Model(config, params, None, "random", np.float32)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 256, rng.integers(8, 24)).astype(np.int32) for _ in range(40)]
    data = TokenizedDataset(tuple(TokenizedExample(x, x) for x in ids), pad_id=0)
    settings = TrainSettings(
        steps=STEPS, batch_size=2, learning_rate=1e-2, schedule="cosine", warmup=2, save_every=1,
        eval_every=4,
    )  # fmt: skip
    lora = qj.LoraConfig(rank=4, dropout=0.1, targets=("q_proj", "down_proj"))
    held_out = dataclasses.replace(data, examples=data.examples[:4])
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    fit(model, lora, data, settings, output, evaluation=held_out, resume=True, display=False)


def prepare() -> None:
    """What the server imports before it is asked for the first process."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    modules = ["qlora_jax.training.trainer", "orbax.checkpoint", "grain", "matplotlib.figure"]
    CONTEXT.set_forkserver_preload([*modules, "matplotlib.backends.backend_agg"])


def start(output: Path, cache: Path, fill: bool = False) -> BaseProcess:
    process = CONTEXT.Process(target=train, args=(str(output), str(cache), fill))
    process.start()
    return process


def to_the_end(output: Path, cache: Path, fill: bool = False) -> None:
    process = start(output, cache, fill)
    process.join()
    if process.exitcode:
        raise SystemExit(f"{output}: the run ended with {process.exitcode}")


def lines(output: Path) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl, without what depends on the clock."""
    path = output / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    return [{k: x for k, x in entry.items() if k not in CLOCK} for entry in found]


def kill(output: Path, cache: Path, rng: random.Random) -> str | None:
    """Starts the run and kills it somewhere in a step that it still has before it: what it was at.
    None: it had ended before."""
    done = max((int(p.name[5:]) for p in output.glob("step-*")), default=0)
    target, delay = rng.randint(done, STEPS), rng.uniform(0, 0.2)
    process = start(output, cache)
    while process.is_alive():
        found = lines(output)
        if target == done or (found and found[-1]["step"] >= target):
            break
        time.sleep(0.002)
    # Before the first step of a process all is read, compiled or restored: seconds, not moments.
    time.sleep(delay if target > done else 20 * delay)
    if not process.is_alive():
        return None
    process.kill()
    process.join()
    if any(output.glob(".step-*.part")):
        return "saving a checkpoint"
    now = max((int(p.name[5:]) for p in output.glob("step-*")), default=0)
    return "starting" if now == done else "between"


def result(output: Path) -> tuple[str, str]:
    """The adapter, and the loss curve, as hashes."""
    adapter = (output / "adapter_model.safetensors").read_bytes()
    curve = json.dumps(lines(output)).encode()
    return hashlib.sha256(adapter).hexdigest(), hashlib.sha256(curve).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prepare()
    rng, found, moments = random.Random(options.seed), [], collections.Counter()
    with tempfile.TemporaryDirectory() as work:
        cache = Path(work) / "compiled"
        to_the_end(Path(work) / "whole", cache, fill=True)
        expected = result(Path(work) / "whole")
        for number in range(options.runs):
            output, kills = Path(work) / str(number), 0
            output.mkdir()
            # At least once; then again with a chance of one in three.
            while not kills or rng.random() < 1 / 3:
                moment = kill(output, cache, rng)
                if moment is not None:
                    moments[moment] += 1
                    kills += 1
                elif not kills:
                    raise SystemExit(f"run {number} ended before it could be killed")
                else:
                    break
            to_the_end(output, cache)
            found.append(result(output))
            print(f"run {number}: {kills} kills, {found[-1] == expected}", file=sys.stderr)
    print(f"{options.runs} runs of {STEPS} steps, killed {sum(moments.values())} times\n")
    print("| killed while | times |\n|---|---|")
    for moment, times in sorted(moments.items()):
        print(f"| {moment} | {times} |")
    for name, values in zip(("adapter", "loss curve"), zip(*found, strict=True), strict=True):
        same = sum(value == expected[name == "loss curve"] for value in values)
        print(f"\n{name}: {same} of {options.runs} are those of the run that nobody killed")
    if any(values != expected for values in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
