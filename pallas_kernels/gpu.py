"""NF4 matmul on Hopper GPUs (Pallas, Mosaic GPU): x @ W and g @ W^T, W decoded on the way.

A weight is laid out as `reference.py` says. `gpu_kernel.py` is the kernel, `gpu_decode.py` the
lookup, `gpu_tiles.py` how the work is cut.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_tiles import choose

DTYPES = ("bfloat16", "float16")  # of x: what the tensor cores multiply with fp32 sums
BLOCK_SIZES = (32, 64, 128, 256)  # half a block fills the layout's eight rows; two tiles fit
MULTIPLE = 64  # of K and N: the width of a tile that TMA swizzles


def unavailable() -> str | None:
    """Why these kernels do not run on the GPU at hand; None where they do."""
    try:
        from pallas_kernels import gpu_kernel  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"JAX {jax.__version__} has no Pallas Mosaic GPU as it is used here ({error})"
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return f"it needs a Hopper GPU, the default device is a {device.device_kind}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    # wgmma is Hopper's alone: neither Ampere nor Blackwell has it.
    if not capability.startswith("9."):
        return (
            f"it needs a GPU of compute capability 9.0 (Hopper), this {device.device_kind} "
            f"has {capability}"
        )
    return None


def unsupported(k: int, n: int, block_size: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why the kernels do not take such a weight or such an x; None where they do."""
    if jnp.dtype(dtype).name not in DTYPES:
        return f"x must be {' or '.join(DTYPES)}, got {jnp.dtype(dtype).name}"
    if block_size not in BLOCK_SIZES:
        return f"block_size must be one of {BLOCK_SIZES}, got {block_size}"
    if k % MULTIPLE or n % MULTIPLE:
        return f"the weight's sides must be multiples of {MULTIPLE}, got K={k} x N={n}"
    return None


def nf4_matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    out_dtype: jax.typing.DTypeLike,
    precision: jax.lax.PrecisionLike = None,
    interpret: Any = False,
) -> jax.Array:
    """x [M, K] (bf16 or fp16) times the 4-bit weight [K, N] -> [M, N], accumulated in fp32.

    packed uint8 [K/2, N], scales fp32 [K/block, N], codebook fp32 [16]. precision changes nothing:
    16-bit factors are multiplied exactly. interpret: as in plgpu.kernel, for machines without a
    GPU. A shape or dtype that the kernels do not take is a ValueError.
    """
    del precision
    return _call(x, packed, scales, codebook, jnp.dtype(out_dtype), False, interpret)


def nf4_matmul_transposed(
    g: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    out_dtype: jax.typing.DTypeLike,
    precision: jax.lax.PrecisionLike = None,
    interpret: Any = False,
) -> jax.Array:
    """g [M, N] (bf16 or fp16) times the transposed weight -> [M, K]; otherwise as nf4_matmul."""
    del precision
    return _call(g, packed, scales, codebook, jnp.dtype(out_dtype), True, interpret)


@functools.partial(jax.jit, static_argnums=(4, 5, 6), inline=True)
def _call(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    out_dtype: Any,
    transposed: bool,
    interpret: Any,
) -> jax.Array:
    # Imported late: the library must import where JAX comes without Mosaic GPU.
    from pallas_kernels.gpu_decode import lane_table
    from pallas_kernels.gpu_kernel import multiply

    m, contracted = x.shape
    k, n = 2 * packed.shape[0], packed.shape[1]
    if contracted != (n if transposed else k):
        raise ValueError(f"x {x.shape} does not fit a weight of {k} x {n}, {transposed=}")
    block = k // scales.shape[0]
    if reason := unsupported(k, n, block, x.dtype):
        raise ValueError(f"NF4 matmul in Mosaic GPU: {reason}")
    tiles = choose(m, k, n, block, transposed)
    # TMA moves whole groups of eight rows.
    x = jnp.pad(x, ((0, -m % 8), (0, 0)))
    parts_dtype = out_dtype if tiles.splits == 1 else jnp.float32
    parts = multiply(x, packed, scales, lane_table(codebook), parts_dtype, tiles, interpret)
    y = parts[0] if tiles.splits == 1 else parts.sum(0).astype(out_dtype)
    return y[:m]
