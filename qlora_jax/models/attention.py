"""Grouped-query attention with rotary positions, and the masks that it uses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.models.rope import rotate


class Attention(nnx.Module):
    """q, k, v, o projections around `attend`; qk_norm: q and k are normalized before rotation."""

    def __init__(
        self,
        config: Any,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: Any = None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """config: a DecoderConfig; qk_norm: makes the two norms, which are over a head."""
        linear = functools.partial(
            nnx.Linear,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        width = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = linear(width, queries, use_bias=qkv_bias)
        self.k_proj = linear(width, keys, use_bias=qkv_bias)
        self.v_proj = linear(width, keys, use_bias=qkv_bias)
        self.o_proj = linear(queries, width, use_bias=o_bias)
        self.qk_norm = qk_norm is not None
        if qk_norm is not None:
            self.q_norm, self.k_norm = qk_norm(), qk_norm()

    def project(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> q [B, T, H, Dh], k and v [B, T, Hkv, Dh], q and k rotated."""
        split = (*x.shape[:2], -1, self.head_dim)
        q, k = self.q_proj(x).reshape(split), self.k_proj(x).reshape(split)
        v = self.v_proj(x).reshape(split)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array | None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> jax.Array:
        """q [B, T, H, Dh] over k, v [B, S, Hkv, Dh] -> [B, T, D]; the rest as for `attend`."""
        out = attend(q, k, v, mask, scale=scale, softcap=softcap)
        return self.o_proj(out.reshape(*out.shape[:2], -1))


BLOCK = 128
"""Queries that are attended together, where a sequence attends to itself."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """q [B, T, H, Dh] over k, v [B, S, Hkv, Dh] -> [B, T, H, Dh]; mask None: plainly causal.

    scale: of the scores, 1 / sqrt(Dh) by default; softcap: scores x become cap * tanh(x / cap).
    Where T = S no query sees a later key, so that the queries are taken in blocks, each over the
    keys up to its own end: that halves the work and the size of the probabilities.
    """
    time = q.shape[1]
    if time != k.shape[1]:
        return _attend_block(q, k, v, mask, 0, time, k.shape[1], scale, softcap)
    # Blocks are unrolled: at most 16 of them, to keep programs small.
    block = BLOCK * max(1, -(-time // (16 * BLOCK)))
    parts = []
    for start in range(0, time, block):
        end = min(start + block, time)
        parts.append(_attend_block(q, k, v, mask, start, end, end, scale, softcap))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


# Under jax.checkpoint only q, k and v are kept for the backward pass: the T x S probabilities of
# every layer would be by far the largest residual, and computing them again is cheap. Blocks are
# cut inside, so that they keep the whole arrays together and not a slice each.
# prevent_cse=False: the layers run inside a scan, whose forward and backward loops are separate.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(4, 5, 6, 7, 8))
def _attend_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    start: int,
    end: int,
    seen: int,
    scale: float | None,
    softcap: float | None,
) -> jax.Array:
    """Queries `start` to `end` over the first `seen` keys; mask None: plainly causal."""
    if mask is None:
        here = causal_mask(jnp.arange(start, end), seen, None)
    else:
        here = mask[:, :, start:end, :seen]
    q, k, v = q[:, start:end], k[:, :seen], v[:, :seen]
    if softcap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=here, scale=scale)
    return _capped_attention(q, k, v, here, scale or q.shape[-1] ** -0.5, softcap)


def _capped_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, softcap: float
) -> jax.Array:
    """What `jax.nn.dot_product_attention` does, which knows no cap; softmax in fp32."""
    groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btngd,bsnd->bngts", groups, k, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores * (scale / softcap))
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bngts,bsnd->btngd", weights, v).reshape(q.shape)


def causal_mask(queries: jax.Array, slots: int, valid: jax.Array | None) -> jax.Array:
    """Which slots each query may see: [1 or B, 1, T, S] bool.

    queries [T] is the slot of each query; valid [B, S] is False on padding.
    """
    mask = (jnp.arange(slots)[None, :] <= queries[:, None])[None, None]
    return mask if valid is None else mask & valid[:, None, None, :]


def within_window(queries: jax.Array, slots: int, window: jax.Array) -> jax.Array:
    """[1, 1, T, S] bool: the slot is one of the last `window` up to and including the query's."""
    return (queries[:, None] - jnp.arange(slots)[None, :] < window)[None, None]


def same_segment(segment_ids: jax.Array) -> jax.Array:
    """[B, 1, T, T] bool: query and key belong to the same document; segment_ids [B, T]."""
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
