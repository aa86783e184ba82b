"""Attention and its gradient on the device at hand: JAX's own operations beside fused kernels.

    python -m benchmarks.attention [--shapes 4x2048 1x16384] [--heads 32] [--width 128]

Causal attention of one layer in bf16, its result and the gradients of q, k and v; packed: of rows
that hold eight documents. Medians of --repeats calls, in turns; temporaries as the compiler counts
them.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.models.attention import KERNELS, attend, use_attention
from qlora_jax.models.masks import Mask

DOCUMENTS = 8


def compiled(implementation: Any, packed: bool, *qkv: jax.Array) -> Any:
    """A program of q, k, v [B, T, H, Dh]: the gradients of the squares of their attention."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        batch, length = q.shape[:2]
        ids = jnp.broadcast_to(jnp.arange(length) * DOCUMENTS // length, (batch, length))
        mask = Mask(segment_ids=ids) if packed else Mask()
        return jnp.sum(attend(q, k, v, mask).astype(jnp.float32) ** 2)

    with use_attention(implementation):
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*qkv).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=["4x2048", "1x16384"], metavar="BxT")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    here = [name for name, kernel in KERNELS.items() if not kernel.unavailable()]
    print(f"{jax.local_devices()[0].device_kind}, JAX {jax.__version__}")
    print("| batch | rows | by | ms | of xla | temporaries, MiB |")
    print("|---" * 6 + "|")
    for shape in options.shapes:
        batch, length = map(int, shape.split("x"))
        size = (batch, length, options.heads, options.width)
        q, k, v = (
            jax.random.normal(key, size, jnp.bfloat16)
            for key in jax.random.split(jax.random.key(0), 3)
        )
        for packed in (False, True):
            programs = {name: compiled(name, packed, q, k, v) for name in ("xla", *here)}
            taken: dict[str, list[float]] = {name: [] for name in programs}
            for turn in range(options.repeats + 1):
                for name, program in programs.items():
                    start = time.perf_counter()
                    jax.block_until_ready(program(q, k, v))
                    if turn:  # the first call has to load what it needs
                        taken[name].append(time.perf_counter() - start)
            median = {name: statistics.median(seconds) for name, seconds in taken.items()}
            for name, program in programs.items():
                print(
                    f"| {shape} | {'packed' if packed else 'whole'} | {name} | "
                    f"{1e3 * median[name]:.2f} | {median[name] / median['xla']:.2f} | "
                    f"{program.memory_analysis().temp_size_in_bytes / 2**20:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
