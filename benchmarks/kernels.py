"""The 4-bit kernels at the shapes of LLaMA, on the device at hand.

    python -m benchmarks.kernels --help

Products x W (forward) and g W^T (backward) beside a dense product of the same shape and dtype, and
quantizing and dequantizing in bytes read and written. With bitsandbytes and torch installed for
the same kind of device, its matmul_4bit (which takes gemv_4bit for one row) and its backward are
timed in the same rounds; with qlora-jax-cuda, also W written dense by its kernel and multiplied by
the dense product. Times are medians; the ceilings (copy bandwidth, dense matmul) are measured
first. On a shared machine only the ratios say much.

A program runs through as many different weights as it takes to leave no part of them in a cache,
and on a GPU or TPU is started several times before the last one is waited for; its time is divided
by both numbers, so that what it costs to start it does not count.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import qlora_jax as qj
from benchmarks.peer_kernels import Peer
from qlora_jax.quant import nf4_matmul, nf4_matmul_transposed

SHAPES = {
    "7B": {"q": (4096, 4096), "k/v": (4096, 1024), "up": (4096, 11008), "down": (11008, 4096)},
    "65B": {"q": (8192, 8192), "k/v": (8192, 1024), "up": (8192, 22016), "down": (22016, 8192)},
}
ROWS = (1, 4, 16, 64, 512, 4096, 16384)
BEYOND_CACHES = {"cpu": 1, "gpu": 640 << 20, "tpu": 160 << 20}  # bytes of 4-bit weights
STARTS = {"cpu": 1, "gpu": 4, "tpu": 4}  # of a program before it is waited for

Runs = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--weights", nargs="+", default=list(SHAPES["7B"]))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--implementation",
        choices=list(qj.backends()),
        default=None,
        help="default: the platform's",
    )
    args = parser.parse_args()
    device = jax.devices()[0]
    dtype = jnp.dtype(jnp.float32 if device.platform == "cpu" else jnp.bfloat16)
    print(f"{device.device_kind}, JAX {jax.__version__}, {dtype.name}; {qj.backends()}")
    starts = STARTS[device.platform]
    copy, flops = ceilings(dtype, args.repeats, starts)
    print(f"copy {copy / 1e9:.0f} GB/s; dense matmul {flops / 1e12:.2f} TFLOP/s\n")
    shapes = [
        (model, name, *shape)
        for model in args.models
        for name, shape in SHAPES[model].items()
        if name in args.weights
    ]
    print("| model | weight | M | product | us | GB/s | of copy | TFLOP/s | of matmul |", end="")
    print(" of dense | of written | of bnb |")
    print("|---" * 12 + "|")
    for model, name, k, n in shapes:
        dense, quantized, peer = weights(k, n, dtype, device.platform)
        for rows in args.rows:
            for transposed in (False, True):
                runs = products(dense, quantized, peer, rows, transposed, args.implementation)
                seconds = alternate(runs, args.repeats)
                ours = seconds["ours"] / len(quantized) / starts
                rate, work = quantized[0].nbytes / ours, 2 * rows * k * n / ours
                ratios = [
                    f"{seconds['ours'] / seconds[other]:.2f}" if other in seconds else "-"
                    for other in ("dense", "written", "bnb")
                ]
                print(
                    f"| {model} | {name} | {rows} | {'g W^T' if transposed else 'x W'} | "
                    f"{ours * 1e6:.1f} | {rate / 1e9:.1f} | {rate / copy:.0%} | "
                    f"{work / 1e12:.2f} | {work / flops:.0%} | {' | '.join(ratios)} |",
                    flush=True,
                )
    print("\n| model | weight | kernel | by | us | GB/s | of copy | of bnb |")
    print("|---" * 8 + "|")
    for model, name, k, n in shapes:
        dense, quantized, peer = weights(k, n, dtype, device.platform)
        # Codes and fp32 scales on one side, dense numbers on the other.
        moved = quantized[0].codes.nbytes + 4 * quantized[0].scales.size + dense[0].nbytes
        for kernel in ("dequantize", "quantize"):
            runs = conversions(kernel, dense, quantized, peer)
            seconds = alternate(runs, args.repeats)
            for by in ("xla", "cuda"):
                if by not in seconds:
                    continue
                each = seconds[by] / len(quantized) / starts
                of_bnb = f"{seconds[by] / seconds['bnb']:.2f}" if peer else "-"
                print(
                    f"| {model} | {name} | {kernel} | {by} | {each * 1e6:.1f} | "
                    f"{moved / each / 1e9:.1f} | {moved / each / copy:.0%} | {of_bnb} |",
                    flush=True,
                )


def weights(k: int, n: int, dtype: Any, platform: str) -> tuple[list[Any], list[Any], Any]:
    """Different dense weights, the same in 4 bits, and bitsandbytes' own of them or None."""
    count = -(-BEYOND_CACHES[platform] // (k * n // 2))
    keys = jax.random.split(jax.random.key(0), count)
    dense = [jax.random.normal(key, (k, n), dtype) for key in keys]
    return (
        dense,
        [qj.quantize(w, qj.NF4()) for w in dense],
        Peer.of(dense, platform, STARTS[platform]),
    )


def products(
    dense: list[Any], quantized: list[Any], peer: Any, rows: int, transposed: bool, name: Any
) -> Runs:
    """Each contender as a call that multiplies by all weights and waits for the results."""
    product = nf4_matmul_transposed if transposed else nf4_matmul
    x = jax.random.normal(
        jax.random.key(1), (rows, dense[0].shape[int(transposed)]), dense[0].dtype
    )
    plain = lambda x, w: x @ (w.T if transposed else w)  # noqa: E731
    runs = {
        "ours": compiled(lambda x, w: product(x, w, implementation=name), x, quantized),
        "dense": compiled(plain, x, dense),
    }
    if qj.backends()["cuda"] == "available":
        written = lambda x, w: plain(x, w.dequantize(x.dtype, implementation="cuda"))  # noqa: E731
        runs["written"] = compiled(written, x, quantized)
    if peer:
        runs["bnb"] = peer.product(rows, transposed)
    return runs


def conversions(kernel: str, dense: list[Any], quantized: list[Any], peer: Any) -> Runs:
    """Quantizing, or dequantizing, all weights. Scales in fp32: double quantization is no part."""
    config = qj.NF4(double_quant=False)
    single = [qj.quantize(w, config) for w in dense]
    runs = {}
    for by in ("xla", "cuda"):
        if by == "cuda" and qj.backends()["cuda"] != "available":
            continue
        if kernel == "quantize":
            call = lambda _, w, by=by: qj.quantize(w, config, implementation=by)  # noqa: E731
            runs[by] = compiled(call, None, dense)
        else:
            call = lambda _, w, by=by: w.dequantize(implementation=by)  # noqa: E731
            runs[by] = compiled(call, None, single)
    if peer:
        runs["bnb"] = peer.conversion(kernel)
    return runs


def compiled(call: Callable[..., Any], x: Any, weights: list[Any]) -> Callable[[], Any]:
    run = jax.jit(lambda x, weights: [call(x, w) for w in weights])
    starts = STARTS[jax.devices()[0].platform]
    return lambda: started(lambda: run(x, weights), starts)


def started(run: Callable[[], Any], starts: int) -> None:
    """Waits for the last of so many; devices do them in their order."""
    for _ in range(starts - 1):
        run()
    jax.block_until_ready(run())


def alternate(runs: Runs, repeats: int) -> dict[str, float]:
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


def ceilings(dtype: Any, repeats: int, starts: int) -> tuple[float, float]:
    """Bytes/s of a copy (read + written) and FLOP/s of a large dense product."""
    size = 2048 if dtype == jnp.float32 else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    block = jnp.zeros((1 << 26,), jnp.float32)
    add, dot = jax.jit(lambda x: x + 1), jax.jit(lambda a: a @ a)
    seconds = alternate(
        {
            "copy": lambda: started(lambda: add(block), starts),
            "dot": lambda: started(lambda: dot(a), starts),
        },
        repeats,
    )
    return 2 * block.nbytes * starts / seconds["copy"], 2 * size**3 * starts / seconds["dot"]


if __name__ == "__main__":
    main()
