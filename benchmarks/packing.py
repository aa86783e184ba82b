"""What packing is worth: time per token of a QLoRA epoch, beside PEFT + bitsandbytes unpacked.

    python -m benchmarks.packing train.jsonl [--batch 4] [--length 512] [--rounds 6]

SmolLM2-135M on this machine's CPU and the first rows of a JSON lines file, such as GSM8K's; answers
are labelled, longer examples cut. Every contender trains on the same examples in a process of its
own, and they take turns step by step, so that a slow minute of the machine hits all of them:

packed            several examples to a row of --length tokens, as many rows as make up --batch x
                  the longest example
grouped           --batch examples of like length, padded to one of three lengths
padded            --batch examples, padded to the longest of all
PEFT, padded      --batch examples, padded to the longest of these, as transformers' collator does
PEFT, one by one  one example, no padding: qlora.py's default

Rank 16 on every linear weight but the head, AdamW, clipping, fp32. Tokens are those of examples;
padding is none. After the warm-up (every shape once), seconds and tokens of all steps are added up.

Needs torch, transformers, PEFT and bitsandbytes: the environment that `make parity` makes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peer_step, smollm2
from qlora_jax.data import TokenizedDataset, read_examples, tokenize

RANK = 16
PEER = "PEFT, padded"
CONTENDERS = ("packed", "grouped", "padded", PEER, "PEFT, one by one")
Step = Callable[[], tuple[float, float, int, int]]
"""-> seconds, those of them that the batch was waited for, tokens of examples, positions."""


def dataset(job: dict[str, Any], tokenizer: Any) -> TokenizedDataset:
    examples = read_examples(job["data"])[: job["examples"]]
    return tokenize(examples, tokenizer, job["length"])


def prepare_ours(job: dict[str, Any]) -> Step:
    import jax
    import optax

    import qlora_jax as qj
    from qlora_jax.training.settings import TrainSettings
    from qlora_jax.training.stream import StepBatches

    model = qj.load(job["gguf"], quantization=qj.NF4())
    examples = dataset(job, model.tokenizer)
    rows = job["batch"]
    how: dict[str, Any] = {}
    if job["contender"] == "packed":
        rows = max(1, round(rows * max(map(len, examples)) / job["length"]))
        how = {"packing": True, "sequence_length": job["length"]}
    elif job["contender"] == "grouped":
        how = {"group_by_length": True}
    batches = StepBatches(examples, TrainSettings(steps=10_000, batch_size=rows, **how))
    adapters = qj.lora.init(
        jax.random.key(0), model.params, qj.LoraConfig(rank=RANK, alpha=2 * RANK)
    )
    optimizer = optax.adamw(2e-4, weight_decay=0.0)
    state = qj.TrainState.create(adapters, optimizer)
    train = qj.make_train_step(model.loss, optimizer, max_grad_norm=0.3)

    def take(batch: Any) -> float:
        nonlocal state
        state, metrics = train(state, model.params, batch)
        return float(metrics["loss"])

    stream = batches.start()
    seen: set[int] = set()
    while len(seen) < len(batches.buckets):  # compiles each length of rows
        batch = next(stream)
        if batch["input_ids"].shape[1] not in seen:
            take(batch)
            seen.add(batch["input_ids"].shape[1])
    return _timed(stream, take)


def prepare_peer(job: dict[str, Any]) -> Step:
    import torch

    from qlora_jax.checkpoints.gguf import GGUFFile
    from qlora_jax.checkpoints.tokenizer import from_gguf

    examples = dataset(job, from_gguf(GGUFFile(Path(job["gguf"]))))
    size = 1 if job["contender"] != PEER else job["batch"]
    _, step = peer_step.prepare_steps(Path(job["dense"]), RANK)

    def stream() -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        while True:
            order = rng.permutation(len(examples))
            for start in range(0, len(order) - size + 1, size):
                chosen = [examples[int(i)] for i in order[start : start + size]]
                length = max(map(len, chosen))
                shape = (size, length)
                batch = {
                    "input_ids": np.full(shape, examples.pad_id),
                    "labels": np.full(shape, -100),
                    "attention_mask": np.zeros(shape, int),
                }
                for row, example in enumerate(chosen):
                    batch["input_ids"][row, : len(example)] = example.input_ids
                    batch["labels"][row, : len(example)] = example.labels
                    batch["attention_mask"][row, : len(example)] = 1
                yield batch

    def take(batch: dict[str, np.ndarray]) -> float:
        return step({name: torch.from_numpy(array) for name, array in batch.items()})

    batches = stream()
    take(next(batches))
    return _timed(batches, take)


def _timed(batches: Iterator[Any], take: Callable[[Any], float]) -> Step:
    def step() -> tuple[float, float, int, int]:
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        loss = take(batch)
        seconds = time.perf_counter() - began
        assert np.isfinite(loss)
        return seconds, waited, int(batch["attention_mask"].sum()), batch["input_ids"].size

    return step


def child(job: dict[str, Any]) -> None:
    """One contender, in this process: a step for each line of stdin."""
    ours = not job["contender"].startswith("PEFT")
    step = prepare_ours(job) if ours else prepare_peer(job)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


def answer(process: "subprocess.Popen[str]") -> Any:
    """The next line that the child printed by itself; what packages print is passed over."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            print(line, end="", file=sys.stderr)
    raise RuntimeError(f"a contender ended: exit status {process.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="JSON lines")
    parser.add_argument("--examples", type=int, default=256, help="rows taken of it")
    parser.add_argument("--batch", type=int, default=4, help="examples of a padded batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each contender")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return

    gguf = smollm2.gguf()
    with tempfile.TemporaryDirectory() as folder:
        if any(name.startswith("PEFT") for name in options.contenders):
            peer_step.save_dense(gguf, Path(folder))
        job = {"gguf": str(gguf), "dense": folder, "data": str(options.data)}
        job |= {name: getattr(options, name) for name in ("examples", "batch", "length")}
        running: dict[str, subprocess.Popen[str]] = {}
        for name in options.contenders:
            command = [sys.executable, "-m", "benchmarks.packing", str(options.data)]
            running[name] = subprocess.Popen(
                [*command, "--child", json.dumps(job | {"contender": name})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            answer(running[name])
        totals = {name: np.zeros(4) for name in running}
        for number in range(options.rounds):
            for name, process in running.items():
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                taken = answer(process)
                totals[name] += taken
                print(f"round {number + 1}, {name}: {taken}", file=sys.stderr)
        for process in running.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    report(totals)


def report(totals: dict[str, np.ndarray]) -> None:
    print("| contender | tokens | of positions | ms/token | of PEFT, padded | input, of time |")
    print("|---|---|---|---|---|---|")
    peer = totals.get(PEER)
    for name, (seconds, waited, tokens, positions) in totals.items():
        ratio = "" if peer is None else f"{seconds / tokens / (peer[0] / peer[2]):.2f}"
        each = f"{1000 * seconds / tokens:.2f} | {ratio} | {waited / seconds:.2%}"
        print(f"| {name} | {tokens:.0f} | {tokens / positions:.0%} | {each} |")


if __name__ == "__main__":
    main()
