"""The 4-bit matmul at the shapes of LLaMA, forward and transposed, on the device at hand.

    python -m benchmarks.kernels --help

Every row is timed beside a dense product of the same shape and dtype in the same run, and beside
bitsandbytes where that is installed for the same kind of device. Times are medians; the ceilings
(copy bandwidth, dense matmul) are measured first. On a shared machine only the ratios say much.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qlora_jax as qj
from qlora_jax.quant import nf4_matmul, nf4_matmul_transposed

SHAPES = {
    "7B": {"q": (4096, 4096), "k/v": (4096, 1024), "up": (4096, 11008), "down": (11008, 4096)},
    "65B": {"q": (8192, 8192), "k/v": (8192, 1024), "up": (8192, 22016), "down": (22016, 8192)},
}
ROWS = (1, 4, 16, 64, 512, 4096, 16384)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--implementation", choices=list(qj.backends()), default=None)
    args = parser.parse_args()
    device = jax.devices()[0]
    dtype = jnp.dtype(jnp.float32 if device.platform == "cpu" else jnp.bfloat16)
    print(f"{device.device_kind}, JAX {jax.__version__}, {dtype.name}; {qj.backends()}")
    copy, flops = ceilings(dtype, args.repeats)
    print(f"copy {copy / 1e9:.0f} GB/s; dense matmul {flops / 1e12:.2f} TFLOP/s\n")
    print("| model | weight | M | product | ms | of dense | of bnb | GB/s | of copy | of matmul |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model in args.models:
        for name, (k, n) in SHAPES[model].items():
            dense = jax.random.normal(jax.random.key(0), (k, n), dtype)
            w = qj.quantize(dense, qj.NF4())
            peer = bitsandbytes(dense, device.platform)
            for rows in args.rows:
                for transposed in (False, True):
                    runs = contenders(dense, w, rows, transposed, args.implementation)
                    if peer:
                        runs["bnb"] = peer(rows, transposed)
                    seconds = alternate(runs, args.repeats)
                    ours = seconds["ours"]
                    of_bnb = f"{ours / seconds['bnb']:.2f}" if peer else "-"
                    rate, work = w.nbytes / ours, 2 * rows * k * n / ours
                    print(
                        f"| {model} | {name} | {rows} | {'x W^T' if transposed else 'x W'} | "
                        f"{ours * 1e3:.3f} | {ours / seconds['dense']:.2f} | {of_bnb} | "
                        f"{rate / 1e9:.1f} | {rate / copy:.0%} | {work / flops:.0%} |",
                        flush=True,
                    )


def contenders(
    dense: jax.Array, w: qj.QuantizedArray, rows: int, transposed: bool, implementation: Any
) -> dict[str, Callable[[], Any]]:
    """Our product and the dense one, compiled, each a call that waits for its result."""
    product = nf4_matmul_transposed if transposed else nf4_matmul
    width = dense.shape[1 if transposed else 0]
    x = jax.random.normal(jax.random.key(1), (rows, width), dense.dtype)
    ours = jax.jit(lambda x, w: product(x, w, implementation=implementation))
    plain = jax.jit(lambda x, d: x @ (d.T if transposed else d))
    return {
        "ours": lambda: ours(x, w).block_until_ready(),
        "dense": lambda: plain(x, dense).block_until_ready(),
    }


def alternate(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a busy moment hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def ceilings(dtype: Any, repeats: int) -> tuple[float, float]:
    """Bytes/s of a copy (read + written) and FLOP/s of a large dense product."""
    size = 2048 if dtype == jnp.float32 else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    block = jnp.zeros((1 << 26,), jnp.float32)
    add, dot = jax.jit(lambda x: x + 1), jax.jit(lambda a: a @ a)
    seconds = alternate(
        {
            "copy": lambda: add(block).block_until_ready(),
            "dot": lambda: dot(a).block_until_ready(),
        },
        repeats,
    )
    return 2 * block.nbytes / seconds["copy"], 2 * size**3 / seconds["dot"]


def bitsandbytes(dense: jax.Array, platform: str) -> Callable[[int, bool], Any] | None:
    """A function (rows, transposed) -> a timed call of bitsandbytes on the same weight."""
    try:
        import bitsandbytes.functional as F
        import torch
        from bitsandbytes import matmul_4bit
    except ImportError:
        return None
    device = {"cpu": "cpu", "gpu": "cuda"}.get(platform)
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        return None
    weight = torch.from_numpy(np.array(dense.T, np.float32)).to(device)
    weight = weight if device == "cpu" else weight.bfloat16()
    packed, state = F.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )

    def call(rows: int, transposed: bool) -> Callable[[], None]:
        width = weight.shape[0] if transposed else weight.shape[1]
        x = torch.randn(rows, width, dtype=weight.dtype, device=device)

        def run() -> None:
            with torch.no_grad():
                if transposed:  # what its backward does
                    x @ F.dequantize_4bit(packed, state).to(x.dtype)
                else:
                    matmul_4bit(x, packed.t(), quant_state=state)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return call


if __name__ == "__main__":
    main()
