"""NF4 matrix products in CUDA C++, for NVIDIA GPUs from Turing (T4) on.

Plain arrays in and out, with the layout of a 4-bit weight [K, N] that qlora-jax's
pallas_kernels.reference describes: codes uint8 [K/2, N], scales [K/block, N], codebook fp32 [16].
Under jit these are calls of XLA's foreign functions; see library.py and src/handlers.cc.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_cuda import library

FEW_ROWS = 16
"""Up to so many rows of x are multiplied while W is read once, nested scales with it."""


@functools.cache
def unavailable() -> str | None:
    """Why these kernels do not run on the GPU at hand; None where they do."""
    if not library.PATH.exists():
        return "qlora-jax-cuda has not been compiled: pip install ./cuda_ext"
    if reason := library.mismatch(library.built_for(library.PATH), library.installed()):
        return reason
    device = jax.local_devices()[0]
    capability = _capability(device)
    if capability is None:
        return f"it needs an NVIDIA GPU, the default device is a {device.device_kind}"
    if capability < (7, 5):
        has = "{}.{}".format(*capability)
        return f"it needs compute capability 7.5, this {device.device_kind} has {has}"
    library.register(library.PATH)
    return None


def _capability(device: Any) -> tuple[int, int] | None:
    """(8, 6) of an NVIDIA GPU; None of anything else ("gfx942" is one of AMD's)."""
    parts = str(getattr(device, "compute_capability", "")).split(".")
    if device.platform != "gpu" or not all(part.isdigit() for part in parts):
        return None
    return int(parts[0]), int(parts[-1])


def unsupported(k: int, n: int, block_size: int, dtype: Any) -> str | None:
    """Why the kernels do not take such a weight or such an x; None where they do."""
    name = jnp.dtype(dtype).name
    if name not in ("bfloat16", "float16"):
        return f"x must be bfloat16 or float16, got {name}"
    capability = _capability(jax.local_devices()[0])
    if name == "bfloat16" and capability is not None and capability < (8, 0):
        return "this GPU multiplies float16 only (bfloat16 needs compute capability 8.0)"
    if k % 64 or n % 16:
        return f"K must be a multiple of 64 and N one of 16, got K={k} x N={n}"
    if not (32 <= block_size <= 4096 and block_size & (block_size - 1) == 0):
        return f"block_size must be a power of two from 32 to 4096, got {block_size}"
    return None


def nf4_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    *nested: jax.Array,
    out_dtype: Any,
    precision: Any = None,
) -> jax.Array:
    """x [M, K] (bf16 or fp16) times the 4-bit weight [K, N] -> [M, N], accumulated in fp32.

    scales fp32 [K/block, N]; or, for at most FEW_ROWS rows, uint8 of that shape, with nested:
    the nested absmax fp32 [ceil(K/block * N / 256)], the offset fp32 [], and the 256 levels fp32
    that the scales' codes stand for. precision changes nothing: 16-bit factors are multiplied
    exactly. What the kernels do not take is an error with XLA's status, in words.
    """
    del precision
    return _matmul(x, (codes, codebook, scales, *nested), jnp.dtype(out_dtype), False)


def nf4_matmul_transposed(
    g: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    *,
    out_dtype: Any,
    precision: Any = None,
) -> jax.Array:
    """g [M, N] (bf16 or fp16) times the transposed weight -> [M, K]; fp32 scales, as above."""
    del precision
    return _matmul(g, (codes, codebook, scales), jnp.dtype(out_dtype), True)


def _matmul(
    x: jax.Array, weight: Sequence[jax.Array], out_dtype: Any, transposed: bool
) -> jax.Array:
    m, (half_k, n) = x.shape[0], weight[0].shape
    parts = splits(m, 2 * half_k, n, transposed)
    # The parts are added here and not in a kernel, so that XLA can fuse what follows.
    shape = (parts, m, 2 * half_k if transposed else n)
    result = jax.ShapeDtypeStruct(shape, out_dtype if parts == 1 else jnp.float32)
    y = jax.ffi.ffi_call("qlora_matmul", result)(x, *weight, transposed=transposed)
    return y[0] if parts == 1 else y.sum(0).astype(out_dtype)


def splits(m: int, k: int, n: int, transposed: bool) -> int:
    """Into how many parts to cut the sums, so that all of a GPU has work.

    A thread block computes 128 outputs of up to `rows` rows. Two blocks for each of an H100's
    132 processors are aimed at; a part must keep a block's eight warps busy (512 rows of W, or
    four steps of 64), and writing and reading the parts must stay small beside reading W
    (m / k * splits <= 1/64 for few rows). Chosen by arithmetic; no GPU has confirmed it yet.
    """
    outputs, depth = (k, n) if transposed else (n, k)
    few = m <= FEW_ROWS and not transposed
    rows = FEW_ROWS if few else 32 if m <= 32 else 64 if m <= 64 else 128
    blocks = -(-m // rows) * -(-outputs // 128)
    most = min(depth // 512, k // (64 * max(m, 1))) if few else min(depth // 256, 4)
    return max(1, min(264 // max(blocks, 1), most))


def dequantize(
    codes: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    *nested: jax.Array,
    dtype: Any,
) -> jax.Array:
    """The dense weight [K, N] of `dtype` (fp32, bf16 or fp16): fp32 product, rounded once.

    scales and nested: as `nf4_matmul` takes them for few rows.
    """
    shape = (2 * codes.shape[0], codes.shape[1])
    result = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return jax.ffi.ffi_call("qlora_dequantize", result)(codes, codebook, scales, *nested)


def quantize(x: jax.Array, codebook: np.ndarray, block_size: int) -> tuple[jax.Array, jax.Array]:
    """x [K, N] -> codes uint8 [Kp/2, N] and absmax fp32 [Kp/block, N], Kp: K up to whole blocks.

    codebook [16] by code, in any order; x is fp32, bf16 or fp16, without NaN and Inf.
    """
    k, n = x.shape
    blocks = -(-k // block_size)
    order = np.argsort(codebook, stable=True)
    ascending = np.asarray(codebook, np.float32)[order]
    thresholds = (ascending[1:] + ascending[:-1]) / np.float32(2)
    results = (
        jax.ShapeDtypeStruct((blocks * block_size // 2, n), jnp.uint8),
        jax.ShapeDtypeStruct((blocks, n), jnp.float32),
    )
    call = jax.ffi.ffi_call("qlora_quantize", results)
    return tuple(call(x, jnp.asarray(thresholds), jnp.asarray(order.astype(np.uint8))))
