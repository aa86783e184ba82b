"""Rotary position embedding and its rescalings for long contexts."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.models.config import LlamaConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular step per position of every pair, fp32 [Dh/2], and the factor on cos and sin.

    For `dynamic` these are the frequencies inside the trained context; see `rotation`.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        assert rope.factor is not None
        return (base / np.float32(rope.factor)).astype(np.float32), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, base), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, base, head_dim)
    return base, 1.0


def _llama3(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, a linear blend between."""
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor
    context = rope.original_max_position_embeddings
    turns = context * base / np.float32(2 * math.pi)  # rotations within the trained context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (base * ((1 - blend) / rope.factor + blend)).astype(np.float32)


def _yarn(rope: RopeConfig, base: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    """Yarn (arXiv 2309.00071): a ramp over dimensions, and a temperature on the logits."""
    context = rope.original_max_position_embeddings
    assert context is not None
    factor = rope.factor or 1.0

    def dimension(turns: float) -> float:
        """The (real-valued) pair that makes `turns` rotations within the trained context."""
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast or 32.0), dimension(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / span, 0.0, 1.0)
    frequencies = (base * (ramp / factor + (1 - ramp))).astype(np.float32)

    def temperature(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return frequencies, temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return frequencies, temperature(1.0)


def rotation(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, fp32 [B, T, Dh/2], of the given positions [B, T].

    `dynamic` scaling depends on the longest sequence of the batch (its largest position): past the
    trained context the base grows with it.
    """
    frequencies, factor = inverse_frequencies(config.rope, config.head_dim)
    step = jnp.asarray(frequencies)
    if config.rope.kind == "dynamic":
        assert config.rope.factor is not None
        trained = config.max_position_embeddings
        length = jnp.maximum(jnp.max(positions) + 1, trained).astype(jnp.float32)
        growth = config.rope.factor * length / trained - (config.rope.factor - 1)
        dim = config.head_dim
        # (theta * growth^(d/(d-2)))^(-2i/d), written as a product with the unscaled frequencies
        power = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim - 2)
        step = step * growth ** jnp.asarray(-power)
    angles = positions.astype(jnp.float32)[..., None] * step
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, H, Dh] in fp32; the two halves of a head hold the pairs (Hugging Face)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
