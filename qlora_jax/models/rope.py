"""Rotary position embedding and its rescalings for long contexts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import QloraError
from qlora_jax.models.typed import checked, entry

_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base and, for long contexts, how its frequencies are rescaled.

    Field names are those of config.json. `None` means "not given"; `kind` decides which are used.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "original_max_position_embeddings"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise QloraError(f"the {name} of rotary embedding is {value}, expected more than 0")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta` (before)."""
        key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
        given = dict(entry(hf, key, Mapping, {}))
        kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
        given.pop("type", None)
        theta = entry(hf, "rope_theta", float) or 10000.0
        theta = entry(given, "rope_theta", float) or theta
        partial = given.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
        for name in ("rope_theta", "partial_rotary_factor"):
            given.pop(name, None)
        if partial != 1.0:
            raise QloraError(f"partial_rotary_factor {partial} is not supported; only 1.0 is")
        if kind not in _ROPE_KINDS:
            raise QloraError(f"rope scaling {kind!r} is not supported; known: {_ROPE_KINDS}")
        known = {field.name for field in dataclasses.fields(cls)} - {"kind", "theta"}
        unknown = sorted(set(given) - known)
        if unknown:
            raise QloraError(f"rope scaling {kind!r} has settings we do not know: {unknown}")
        missing = [key for key in _ROPE_REQUIRED.get(kind, ()) if given.get(key) is None]
        if missing:
            raise QloraError(f"rope scaling {kind!r} lacks {missing}")
        if kind in ("llama3", "yarn") and given.get("original_max_position_embeddings") is None:
            given["original_max_position_embeddings"] = hf.get(
                "original_max_position_embeddings", hf.get("max_position_embeddings", 2048)
            )
        kinds = {"original_max_position_embeddings": int, "truncate": bool}
        settings = {
            name: checked(f"{key}.{name}", value, kinds.get(name, float))
            for name, value in given.items()
            if value is not None
        }
        return cls(kind=kind, theta=theta, **settings)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` entry of config.json."""
        fields = dataclasses.asdict(self)
        out: dict[str, Any] = {"rope_type": fields.pop("kind"), "rope_theta": fields.pop("theta")}
        if self.kind != "yarn":
            fields.pop("truncate")
        return out | {key: value for key, value in fields.items() if value is not None}


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


def rotation(
    rope: RopeConfig, dim: int, trained: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, fp32 [B, T, dim/2], of the given positions [B, T].

    dim: the entries of a head that are rotated; trained: the length of the trained context.
    `dynamic` scaling depends on the longest sequence of the batch (its largest position): past the
    trained context the base grows with it.
    """
    frequencies, factor = inverse_frequencies(rope, dim)
    step = jnp.asarray(frequencies)
    if rope.kind == "dynamic":
        assert rope.factor is not None
        length = jnp.maximum(jnp.max(positions) + 1, trained).astype(jnp.float32)
        growth = rope.factor * length / trained - (rope.factor - 1)
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
