"""Peak memory of `qlora-jax convert`, beside the size of the checkpoint and of what is written.

    python -m benchmarks.convert_memory [--layers 12] [--hidden 1024] [--vocabulary 32000]

A random bf16 checkpoint is converted to every format, each in a process of its own. Counted as in
`loading_memory`, at the second conversion. Linux only.
"""

import argparse
import ctypes
import gc
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.loading_memory import Peak, anonymous, write

TARGETS = ("safetensors", "bitsandbytes", "gguf-f16", "gguf-q8_0")


def size_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def child(job: dict[str, Any]) -> dict[str, int]:
    from qlora_jax.commands.convert import Convert

    dest = Path(job["dest"])

    def convert() -> None:
        Convert(source=job["model"], dest=dest, to=job["to"]).run()

    convert()
    shutil.rmtree(dest) if dest.is_dir() else dest.unlink()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = anonymous()
    with Peak() as peak:
        convert()
    return {"peak": peak.bytes - before, "size": size_of(dest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return
    largest = 2 * max(options.vocabulary, 11 * options.hidden // 4) * options.hidden
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        write(model, options.layers, options.hidden, options.vocabulary)
        print(f"checkpoint {size_of(model) / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB\n")
        print("| to | written, MB | peak memory, MB | peak, in largest tensors |")
        print("|---|---|---|---|")
        for to in TARGETS:
            job = {"model": str(model), "dest": str(Path(work) / "out"), "to": to}
            command = [sys.executable, "-m", "benchmarks.convert_memory", "--child"]
            done = subprocess.run(
                [*command, json.dumps(job)], stdout=subprocess.PIPE, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            dest = Path(work) / "out"
            shutil.rmtree(dest) if dest.is_dir() else dest.unlink()
            print(
                f"| {to} | {found['size'] / 1e6:.0f} | {found['peak'] / 1e6:.0f} "
                f"| {found['peak'] / largest:.1f} |"
            )


if __name__ == "__main__":
    main()
