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

_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
_ORIGINAL = "original_max_position_embeddings"
_KINDS: dict[str, type] = {
    _ORIGINAL: int,
    "truncate": bool,
    "short_factor": list,
    "long_factor": list,
}
"""Of the settings that are not real numbers."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base and, for long contexts, how its frequencies are rescaled.

    Field names are those of config.json. `None` means "not given"; `kind` decides which are used.
    partial_rotary_factor: the part of a head that is rotated, its first entries.
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
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "original_max_position_embeddings"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise QloraError(f"the {name} of rotary embedding is {value}, expected more than 0")
        if self.kind == "yarn" and self.theta == 1:
            raise QloraError("the theta of rotary embedding is 1, which yarn cannot scale")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and not 0 < low < high:
            raise QloraError(
                f"low_freq_factor {low} and high_freq_factor {high} of rotary embedding must be "
                "more than 0, the second more than the first"
            )

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, partial: bool = False, longrope: bool = False
    ) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta` (before);
        where a file has both, the scaling counts, as for transformers.

        partial, longrope: whether the family has heads rotated in part, and this scaling.
        Raises QloraError for what it does not know, and for settings that are missing or unknown.
        """
        key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
        given, nested = (dict(entry(hf, k, Mapping, {})) for k in (key, "rope_parameters"))
        kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
        given.pop("type", None)
        thetas = (entry(place, "rope_theta", float) for place in (given, hf, nested))
        theta = next(filter(None, thetas), 10000.0)
        part = entry(hf, "partial_rotary_factor", float, 1.0)
        part = entry(nested, "partial_rotary_factor", float, part)
        part = entry(given, "partial_rotary_factor", float, part)
        for name in ("rope_theta", "partial_rotary_factor"):
            given.pop(name, None)
        if part != 1.0 and not partial:
            raise QloraError(f"partial_rotary_factor {part} is not supported; only 1.0 is")
        supported = [name for name in _ROPE_KINDS if name != "longrope" or longrope]
        if kind not in supported:
            raise QloraError(f"rope scaling {kind!r} is not supported; known: {supported}")
        known = {field.name for field in dataclasses.fields(cls)}
        known -= {"kind", "theta", "partial_rotary_factor"}
        known -= set() if kind == "longrope" else set(_ROPE_REQUIRED["longrope"])
        unknown = sorted(set(given) - known)
        if unknown:
            raise QloraError(f"rope scaling {kind!r} has settings we do not know: {unknown}")
        missing = [key for key in _ROPE_REQUIRED.get(kind, ()) if given.get(key) is None]
        if missing:
            raise QloraError(f"rope scaling {kind!r} lacks {missing}")
        if kind in ("llama3", "yarn", "longrope"):
            context = entry(hf, "max_position_embeddings", int, 2048)
            trained = entry(given, _ORIGINAL, int, context)
            # Where a file says both, transformers goes by the entry outside.
            trained = entry(hf, _ORIGINAL, int, trained)
            if trained < 2:
                raise QloraError(f"{_ORIGINAL} is {trained}, expected at least 2")
            given[_ORIGINAL] = trained
            if kind != "llama3" and given.get("factor") is None:
                given["factor"] = context / trained
        settings = {
            name: _setting(f"{key}.{name}", value, _KINDS.get(name, float))
            for name, value in given.items()
            if value is not None
        }
        return cls(kind=kind, theta=theta, partial_rotary_factor=part, **settings)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` entry of config.json."""
        fields = dataclasses.asdict(self)
        out: dict[str, Any] = {"rope_type": fields.pop("kind"), "rope_theta": fields.pop("theta")}
        if self.kind != "yarn":
            fields.pop("truncate")
        if self.partial_rotary_factor == 1.0:
            fields.pop("partial_rotary_factor")
        lists = {key: list(value) for key, value in fields.items() if isinstance(value, tuple)}
        return out | {key: value for key, value in (fields | lists).items() if value is not None}

    def rotated(self, head_dim: int) -> int:
        """How many entries of a head are rotated.

        Raises QloraError if they do not make pairs, or if the scaling has not one factor a pair.
        """
        size = int(head_dim * self.partial_rotary_factor)
        if size % 2 or not 0 < size <= head_dim:
            raise QloraError(
                f"partial_rotary_factor {self.partial_rotary_factor} of a head_dim of {head_dim} "
                f"is {size}; rotary embedding needs pairs within a head"
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != size // 2:
                raise QloraError(
                    f"{name} has {len(factors)} entries, expected one for each of {size // 2} pairs"
                )
        return size

    def entries_to_hf(self) -> dict[str, Any]:
        """What config.json says of it, to transformers 4 and to 5."""
        parameters = self.to_hf()
        out: dict[str, Any] = {"rope_theta": self.theta, "rope_parameters": parameters}
        if self.kind != "default":
            out["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
        return out


def _setting(name: str, value: Any, kind: type) -> Any:
    """`value` if it is a `kind`; a list becomes a tuple, and must be of numbers."""
    value = checked(name, value, kind)
    if kind is list:
        return tuple(checked(name, item, float) for item in value)
    return value


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular step per position of every pair, fp32 [Dh/2], and the factor on cos and sin.

    For `dynamic` and `longrope` they hold inside the trained context; see `rotation`.
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
    if rope.kind == "longrope":
        return _longrope(rope, base)
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


def _longrope(rope: RopeConfig, base: np.ndarray) -> tuple[np.ndarray, float]:
    """LongRoPE (arXiv 2402.13753): a factor found by search for every pair."""
    context = rope.original_max_position_embeddings
    assert rope.factor and context and rope.short_factor
    growth = 1 + math.log(max(rope.factor, 1.0)) / math.log(context)
    attention = math.sqrt(growth) if rope.attention_factor is None else rope.attention_factor
    return base / np.asarray(rope.short_factor, np.float32), attention


def rotation(
    rope: RopeConfig, dim: int, trained: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, fp32 [B, T, dim/2], of the given positions [B, T].

    dim: the entries of a head that are rotated; trained: the length of the trained context.
    `dynamic` scaling depends on the longest sequence of the batch (its largest position): past the
    trained context the base grows with it. So does `longrope`, which has other factors there.
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
    if rope.kind == "longrope":
        assert rope.original_max_position_embeddings is not None
        long, _ = inverse_frequencies(dataclasses.replace(rope, short_factor=rope.long_factor), dim)
        beyond = jnp.max(positions) >= rope.original_max_position_embeddings
        step = jnp.where(beyond, long, step)
    angles = positions.astype(jnp.float32)[..., None] * step
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, H, Dh] in fp32 by cos and sin [B, T, pairs].

    The pairs are in the first entries of a head, whose two halves hold them (Hugging Face); what is
    behind stays as it is.
    """
    pairs = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (pairs, 2 * pairs), axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    parts = [first * cos - second * sin, second * cos + first * sin, rest]
    turned = jnp.concatenate(parts, axis=-1)
    return turned.astype(x.dtype)
