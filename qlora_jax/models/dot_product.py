"""Softmax attention over whole matrices of scores, in JAX's own operations."""

import jax
import jax.numpy as jnp


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """q [B, T, H, Dh] over k, v [B, S, Hkv, Dh] -> [B, T, H, Dh]; scores and softmax in fp32.

    bias, fp32 [B or 1, H, T, S], is added to the scaled scores; mask, bool [B or 1, 1, T or 1, S],
    is False where a query must not look; scale: 1 / sqrt(Dh) by default; softcap: scores x become
    cap * tanh(x / cap).

    `jax.nn.dot_product_attention` knows no cap, and for bf16 it asks for an algorithm that GPUs
    before Ampere do not have.
    """
    groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btngd,bsnd->bngts", groups, k, preferred_element_type=jnp.float32)
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias.reshape(bias.shape[0], *scores.shape[1:3], *bias.shape[2:])
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bngts,bsnd->btngd", weights, v).reshape(q.shape)
