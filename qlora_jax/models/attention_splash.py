"""Attention on TPU by JAX's splash attention kernels: scores exist for a tile at a time, in VMEM.

https://github.com/jax-ml/jax/tree/main/jax/experimental/pallas/ops/tpu/splash_attention
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qlora_jax.models.masks import Mask
from qlora_jax.models.split import Names, Split, current_split

LANES = 128
"""Of a vector register: what tiles are multiples of."""
TILE = 512
"""At most so many queries by so many keys are multiplied in a step of the kernels."""


class _How(NamedTuple):
    """What is known when tracing; grouped: there are `groups`, mixed: there is `slides`; split: as
    far as batch and heads allow."""

    scale: float
    softcap: float | None
    window: int | None
    grouped: bool
    mixed: bool
    split: Split | None
    interpret: bool


def unavailable() -> str | None:
    """Why the kernels do not run on this machine; None where they do."""
    if all(device.platform != "tpu" for device in jax.local_devices()):
        return "this process has no TPU"
    if jax.device_count() > 1 and current_split() is None:
        return "several devices, and no weight in 4 bits that says how they share the work"
    return None


def unsupported(q: jax.Array, k: jax.Array, mask: Mask, softcap: float | None) -> str | None:
    """Why the kernels do not take these; None where they do."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q must be bfloat16 or float32, got {q.dtype.name}"
    if q.shape[1] < LANES:
        return f"it is for sequences of at least {LANES} tokens, got {q.shape[1]}"
    return None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attend`, for T = S and no cache. interpret: on machines without a TPU.

    For the backward pass q, k and v alone are kept.
    """
    groups, mixed = mask.groups(), mask.window is not None and mask.slides is not None
    how = _How(
        scale=scale or q.shape[-1] ** -0.5,
        softcap=softcap,
        window=mask.window,
        grouped=groups is not None,
        mixed=mixed,
        split=_fitting(current_split(), q.shape[0], k.shape[2]),
        interpret=interpret,
    )
    return _attention(how, q, k, v, *[groups] * how.grouped, *[mask.slides] * how.mixed)


def _fitting(split: Split | None, batch: int, heads: int) -> Split | None:
    """Whole sequences and whole key heads only."""
    if split is None:
        return None

    def fit(size: int, names: Names) -> Names:
        return () if size % math.prod(split.mesh.shape[name] for name in names) else names

    return split._replace(rows=fit(batch, split.rows), heads=fit(heads, split.heads))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: _How, *args: jax.Array) -> jax.Array:
    """args: q, k, v, and what `_local` takes besides."""
    # The log-sum-exp is written too and not read: so the kernel is the one that the backward pass
    # begins with, and where a layer is computed again before it, XLA runs the two as one.
    local = functools.partial(_local, how, with_sums=True)
    return _over_devices(local, how, args)


def _forward(how: _How, *args: jax.Array) -> tuple[jax.Array, Any]:
    return _attention(how, *args), args


def _backward(how: _How, args: Any, g: jax.Array) -> Any:
    def gradients(*args: jax.Array) -> tuple[jax.Array, ...]:
        q, k, v, *more, g = args
        _, pull = jax.vjp(lambda q, k, v: _local(how, q, k, v, *more), q, k, v)
        return pull(g)

    found = _over_devices(gradients, how, (*args, g), gradients=True)
    return (*found, *[None] * (len(args) - 3))


_attention.defvjp(_forward, _backward)


def _local(
    how: _How, q: jax.Array, k: jax.Array, v: jax.Array, *more: jax.Array, with_sums: bool = False
) -> jax.Array:
    """The attention of what one device has."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    rest, time = list(more), q.shape[1]
    groups = rest.pop(0) if how.grouped else None
    slides = rest.pop(0) if how.mixed else None
    extra = _padded(time) - time
    # Keys that fill up the last tile come after every query, which so does not see them.
    q = (q.astype(jnp.float32) * how.scale).astype(q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    ids = None if groups is None else jnp.pad(groups, ((0, 0), (0, extra)))

    def one(kernel: Any, q: Any, k: Any, v: Any, ids: Any) -> jax.Array:
        out = kernel(q, k, v, None if ids is None else splash.SegmentIds(ids, ids))
        return out[0] if with_sums else out

    # If layers are mixed, then also the kernel of those that see everything. Of each head it is the
    # same, and so of any number of heads.
    windows = (how.window, None) if how.mixed else (how.window,)
    kernels = [_kernel(w, _padded(time), how.softcap, with_sums, how.interpret) for w in windows]
    runs = [
        functools.partial(jax.vmap(functools.partial(one, kernel)), q, k, v, ids)
        for kernel in kernels
    ]
    out = runs[0]() if slides is None else jax.lax.cond(slides, *runs)
    return out.swapaxes(1, 2)[:, :time]


@functools.lru_cache(maxsize=16)
def _kernel(
    window: int | None, time: int, softcap: float | None, with_sums: bool, interpret: bool
) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import BlockSizes

    mask: Any = splash.CausalMask((time, time))
    if window is not None:
        mask = splash.LocalMask((time, time), (window - 1, 0), 0)
    tile = math.gcd(time, TILE)
    sizes = BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
    )
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask]),
            block_sizes=sizes,
            attn_logits_soft_cap=softcap,
            save_residuals=with_sums,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _padded(time: int) -> int:
    return time + -time % LANES


def _over_devices(local: Any, how: _How, args: Any, *, gradients: bool = False) -> Any:
    """local(*args), each device on its own sequences and heads; vmap goes from one to the next.

    args: q, k, v, groups if there are; of gradients the last is that of the output.
    """
    call = local
    if how.split is not None:
        rows, heads = how.split.rows or None, how.split.heads or None
        whole = PartitionSpec(rows, None, heads, None)
        places = [PartitionSpec()] * len(args)
        places[:3] = [whole] * 3
        if how.grouped:
            places[3] = PartitionSpec(rows, None)
        if gradients:
            places[-1] = whole
        call = jax.shard_map(
            local,
            mesh=how.split.mesh,
            in_specs=tuple(places),
            out_specs=(whole,) * 3 if gradients else whole,
            check_vma=False,
        )
    return jax.custom_batching.sequential_vmap(call)(*args)
