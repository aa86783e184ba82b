"""Compile attention and its gradient for one device of targets.py and print the memory it takes.

    python -m tests.compile.attention "TPU v5e"

At Llama 2 7B's heads, in bf16, once plainly causal and once packed. Fails if an array is T x T for
every head, or with splash attention at all. Without cuDNN itself XLA leaves out what it works in.
"""

import re
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from qlora_jax.models.attention import attend, use_attention
from qlora_jax.models.masks import Mask
from qlora_jax.plan.worker import cudnn_version
from tests.compile.targets import TARGETS

IMPLEMENTATIONS = {"tpu": "splash", "gpu": "cudnn"}
HEADS, SIZE = 32, 128
SHAPES = ((4, 2048), (1, 16384))


def main(name: str) -> None:
    target = TARGETS[name]
    sharding = SingleDeviceSharding(target.device())

    def shape(*sizes: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    def gradients(q, k, v, g, mask):
        _, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
        return pull(g)

    implementation = IMPLEMENTATIONS[target.compiler]
    for batch, length in SHAPES:
        x = shape(batch, length, HEADS, SIZE, dtype=jnp.bfloat16)
        ids = shape(batch, length, dtype=jnp.int32)
        sizes = []
        start = time.perf_counter()
        for mask in (Mask(), Mask(segment_ids=ids)):
            with use_attention(implementation), cudnn_version():
                # A function of its own each time: jit knows nothing of the names.
                run = jax.jit(lambda *args: gradients(*args))
                compiled = run.lower(x, x, x, x, mask).compile()
            sizes.append(compiled.memory_analysis().temp_size_in_bytes / 2**20)
            squares = set(re.findall(rf"\w+\[[\d,]*{length},{length}\]", compiled.as_text()))
            heads = {s for s in squares if f"{HEADS}," in s}
            assert not (squares if implementation == "splash" else heads), squares
        print(
            f"{name}, {implementation}, {batch} x {length}: temporaries {sizes[0]:.0f} MiB, "
            f"packed {sizes[1]:.0f} MiB (compiled in {time.perf_counter() - start:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1])
