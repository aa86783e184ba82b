"""Attention on NVIDIA GPUs by cuDNN's fused kernels, through `jax.nn.dot_product_attention`.

Causal attention and windows are flags of the kernels. Of packed documents and padding JAX's public
function knows no more than a mask, which cuDNN takes as a bias [B, 1, T, T] of q's dtype and whose
gradient, as large, it computes too: 32 MiB each at 4 x 2048, 512 MiB at 1 x 16384.
"""

import functools

import jax
import jax.numpy as jnp

from qlora_jax.models.masks import Mask

MASK_BYTES = 2**31
"""What a mask and its gradient may take without being asked for: 2 x 16384 tokens, packed."""


def unavailable() -> str | None:
    """Why the kernels do not run on this machine; None where they do."""
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU, the default device is a {device.device_kind}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if not capability[:1].isdigit() or float(capability) < 8:
        return (
            f"it needs a GPU of compute capability 8.0 (Ampere) or newer, this "
            f"{device.device_kind} has {capability}"
        )
    return None


def unsupported(q: jax.Array, k: jax.Array, mask: Mask, softcap: float | None) -> str | None:
    """Why the kernels do not take these; None where they do."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q must be bfloat16 or float16, got {q.dtype.name}"
    if softcap is not None:
        return "it has no cap of the scores"
    # Hopper's take 256; that is not known of a device that is only compiled for.
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"heads must be a multiple of 8 and at most 128 wide, got {q.shape[-1]}"
    if mask.grouped and q.shape[1] % 2:
        return f"with padding or packing T must be even, got {q.shape[1]}"
    return None


def wasteful(q: jax.Array, mask: Mask) -> bool:
    """Whether the mask and its gradient would take more than `MASK_BYTES`."""
    batch, time = q.shape[:2]
    return mask.grouped and 2 * batch * time**2 * q.dtype.itemsize > MASK_BYTES


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """As `attention.attend`, for T = S and no cache."""
    groups = mask.groups()
    same = None if groups is None else (groups[:, :, None] == groups[:, None, :])[:, None]
    run = functools.partial(
        jax.nn.dot_product_attention,
        q, k, v, mask=same, scale=scale, is_causal=True, implementation="cudnn",
    )  # fmt: skip

    def near() -> jax.Array:
        assert mask.window is not None
        return run(local_window_size=(mask.window - 1, 0))

    if mask.window is None:
        return run()
    return near() if mask.slides is None else jax.lax.cond(mask.slides, near, run)
