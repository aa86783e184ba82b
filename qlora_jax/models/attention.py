"""Grouped-query attention with rotary positions, and the masks that it uses."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.rope import rotate

KeyValue = tuple[jax.Array, jax.Array]


class Attention(nnx.Module):
    """q, k, v, o projections around `jax.nn.dot_product_attention`."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
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
        self.qk_norm = config.qk_norm
        self.q_proj = linear(width, queries, use_bias=config.qkv_bias)
        self.k_proj = linear(width, keys, use_bias=config.qkv_bias)
        self.v_proj = linear(width, keys, use_bias=config.qkv_bias)
        self.o_proj = linear(queries, width, use_bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> q [B, T, H, Dh], k and v [B, T, Hkv, Dh], q and k rotated."""
        split = (*x.shape[:2], -1, self.head_dim)
        q, k = self.q_proj(x).reshape(split), self.k_proj(x).reshape(split)
        v = self.v_proj(x).reshape(split)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        """q [B, T, H, Dh] over k, v [B, S, Hkv, Dh] -> [B, T, D]; mask None: plainly causal."""
        out = _attend(q, k, v, mask)
        return self.o_proj(out.reshape(*out.shape[:2], -1))


BLOCK = 128
"""Queries that are attended together, where a sequence attends to itself."""


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """q [B, T, H, Dh] over k, v [B, S, Hkv, Dh] -> [B, T, H, Dh]; mask None: plainly causal.

    Where T = S no query sees a later key, so that the queries are taken in blocks, each over the
    keys up to its own end: that halves the work and the size of the probabilities.
    """
    time = q.shape[1]
    if time != k.shape[1]:
        return _attend_block(q, k, v, mask, 0, time, k.shape[1])
    # Blocks are unrolled: at most 16 of them, to keep programs small.
    block = BLOCK * max(1, -(-time // (16 * BLOCK)))
    parts = []
    for start in range(0, time, block):
        end = min(start + block, time)
        parts.append(_attend_block(q, k, v, mask, start, end, end))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


# Under jax.checkpoint only q, k and v are kept for the backward pass: the T x S probabilities of
# every layer would be by far the largest residual, and computing them again is cheap. Blocks are
# cut inside, so that they keep the whole arrays together and not a slice each.
# prevent_cse=False: the layers run inside a scan, whose forward and backward loops are separate.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(4, 5, 6))
def _attend_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    start: int,
    end: int,
    seen: int,
) -> jax.Array:
    """Queries `start` to `end` over the first `seen` keys; mask None: plainly causal."""
    if mask is None:
        here = causal_mask(jnp.arange(start, end), seen, None)
    else:
        here = mask[:, :, start:end, :seen]
    return jax.nn.dot_product_attention(q[:, start:end], k[:, :seen], v[:, :seen], mask=here)


def causal_mask(queries: jax.Array, slots: int, valid: jax.Array | None) -> jax.Array:
    """Which slots each query may see: [1 or B, 1, T, S] bool.

    queries [T] is the slot of each query; valid [B, S] is False on padding.
    """
    mask = (jnp.arange(slots)[None, :] <= queries[:, None])[None, None]
    return mask if valid is None else mask & valid[:, None, None, :]


def within_window(queries: jax.Array, slots: int, window: jax.Array) -> jax.Array:
    """[1, 1, T, S] bool: the slot is one of the last `window` up to and including the query's."""
    return (queries[:, None] - jnp.arange(slots)[None, :] < window)[None, None]
