"""Peak memory while a checkpoint is loaded and quantized, beside the size of what it becomes.

    python -m benchmarks.loading_memory [--layers 16] [--hidden 2048] [--vocabulary 32000]

A random bf16 checkpoint of that size is written to a temporary folder and loaded in a process of
its own, by us and, where PEFT's packages are installed, by transformers + bitsandbytes. Counted is
anonymous memory (RssAnon; pages of the mapped file are the kernel's to drop) above what the process
had before, all packages being imported: at its first load, in which compiling has a part of a
hundred megabytes or so, whatever the model's size, and at a second one. Linux only.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEER = "transformers + bitsandbytes"


def write(folder: Path, layers: int, hidden: int, vocabulary: int) -> None:
    """A random Llama, untied, in shards of a few layers."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from benchmarks.abstract import config as make_config
    from qlora_jax.checkpoints.names import parameters

    folder.mkdir(parents=True)
    config = make_config(layers, hidden, vocabulary)
    (folder / "config.json").write_text(json.dumps(config.to_hf() | {"torch_dtype": "bfloat16"}))
    weight_map: dict[str, str] = {}
    rng = np.random.default_rng(0)
    shard: dict[str, Any] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for parameter in parameters(config):
        for layer in range(parameter.layers):
            x = rng.standard_normal(parameter.file_shape, np.float32) / 32
            shard[parameter.hf_name(layer)] = x.astype(ml_dtypes.bfloat16)
            if sum(x.nbytes for x in shard.values()) > 200e6:
                flush()
    if shard:
        flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class Peak:
    """The largest `anonymous()` while the block runs, looked at every millisecond."""

    def __enter__(self) -> "Peak":
        self.bytes, self._done = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous())


def ours() -> Callable[[str], tuple[Any, int]]:
    """Imports what it takes -> a function that loads: the model and its bytes."""
    import jax
    import jax.numpy as jnp

    import qlora_jax as qj

    jax.block_until_ready(jnp.zeros(1))

    def load(folder: str) -> tuple[Any, int]:
        params = qj.load(folder, quantization=qj.NF4(), dtype=jnp.bfloat16).params
        jax.block_until_ready(params)
        return params, sum(x.nbytes for x in jax.tree.leaves(params))

    return load


def peer() -> Callable[[str], tuple[Any, int]]:
    """The same of transformers and bitsandbytes."""
    import bitsandbytes  # noqa: F401
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )

    def load(folder: str) -> tuple[Any, int]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
        )
        return model, model.get_memory_footprint()

    return load


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes of the model, and the peaks of both loads above what there was before each."""
    load = peer() if job["contender"] == PEER else ours()
    peaks, size = [], 0
    for _ in range(2):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = anonymous()
        with Peak() as peak:
            model, size = load(job["model"])
        del model
        peaks.append(peak.bytes - before)
    return {"size": size, "peaks": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return
    contenders = ["qlora-jax"]
    if importlib.util.find_spec("bitsandbytes"):
        contenders.append(PEER)
    largest = 2 * max(options.vocabulary, 11 * options.hidden // 4) * options.hidden
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        write(model, options.layers, options.hidden, options.vocabulary)
        total = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        print(f"checkpoint {total / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB\n")
        print("| loaded by | result, MB | peak of two loads, MB | above the result, in tensors |")
        print("|---|---|---|---|")
        for contender in contenders:
            job = {"contender": contender, "model": str(model)}
            command = [sys.executable, "-m", "benchmarks.loading_memory", "--child"]
            done = subprocess.run(
                [*command, json.dumps(job)], stdout=subprocess.PIPE, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            size, peaks = found["size"], found["peaks"]
            print(
                f"| {contender} | {size / 1e6:.0f} "
                f"| {', '.join(f'{peak / 1e6:.0f}' for peak in peaks)} "
                f"| {', '.join(f'{(peak - size) / largest:.1f}' for peak in peaks)} |"
            )


if __name__ == "__main__":
    main()
