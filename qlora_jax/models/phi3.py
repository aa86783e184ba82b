"""Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini: a Llama whose projections are fused."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
from qlora_jax.models.attention import attend
from qlora_jax.models.config import (
    FULL,
    SLIDING,
    DecoderConfig,
    check_positive,
    only,
    required,
    shared_to_hf,
    special_tokens,
)
from qlora_jax.models.decoder import Decoder, PreNormLayer, Rotation
from qlora_jax.models.masks import Mask
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.remat import cheap, named
from qlora_jax.models.rope import RopeConfig, rotate, rotation
from qlora_jax.models.typed import entry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(DecoderConfig):
    """A decoder of the family phi3. Field names follow config.json where it has them."""

    intermediate_size: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("intermediate_size",))
        self.rope.rotated(self.head_dim)

    @property
    def changes_at(self) -> int | None:
        rope = self.rope
        return rope.original_max_position_embeddings if rope.kind == "longrope" else None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Phi3Config":
        sizes = required(
            hf,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        only(hf, hidden_act="silu")
        context = entry(hf, "max_position_embeddings", int, 4096)
        trained = entry(hf, "original_max_position_embeddings", int, 4096)
        heads, window = sizes["num_attention_heads"], entry(hf, "sliding_window", int)
        return cls(
            **sizes,
            model_type="phi3",
            num_key_value_heads=entry(hf, "num_key_value_heads", int, heads),
            head_dim=entry(hf, "head_dim", int, sizes["hidden_size"] // max(heads, 1)),
            layer_types=(SLIDING if window else FULL,) * sizes["num_hidden_layers"],
            sliding_window=window,
            max_position_embeddings=context,
            rms_norm_eps=entry(hf, "rms_norm_eps", float, 1e-5),
            rope=_rope(hf, context, trained),
            tie_word_embeddings=entry(hf, "tie_word_embeddings", bool, False),
            **special_tokens(hf),
        )

    def to_hf(self) -> dict[str, Any]:
        rope = self.rope
        out: dict[str, Any] = {
            **shared_to_hf(self),
            "architectures": ["Phi3ForCausalLM"],
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "original_max_position_embeddings": rope.original_max_position_embeddings or 4096,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": rope.theta,
            "partial_rotary_factor": rope.partial_rotary_factor,
            "rope_scaling": None,
            "sliding_window": self.sliding_window,
        }
        if rope.kind == "longrope":
            assert rope.short_factor and rope.long_factor and rope.original_max_position_embeddings
            # transformers 4 takes these three and no more; 5 reads them too.
            out["rope_scaling"] = scaling = {
                "type": "longrope",
                "short_factor": list(rope.short_factor),
                "long_factor": list(rope.long_factor),
            }
            if rope.factor != self.max_position_embeddings / rope.original_max_position_embeddings:
                scaling["factor"] = rope.factor
            if rope.attention_factor is not None:
                scaling["attention_factor"] = rope.attention_factor
        return out


def _rope(hf: Mapping[str, Any], context: int, trained: int) -> RopeConfig:
    """The rotary embedding of a config.json. transformers reads "su" and "yarn" as "longrope"."""
    scaling = entry(hf, "rope_scaling", Mapping, {})
    if scaling.get("type") in ("su", "yarn"):
        scaling = {**scaling, "type": "longrope"}
    lengths = {
        "max_position_embeddings": context,
        "original_max_position_embeddings": trained,
    }
    rope = RopeConfig.from_hf(
        {**hf, **lengths, "rope_scaling": scaling}, partial=True, longrope=True
    )
    if rope.kind not in ("default", "longrope"):
        raise QloraError(f"rope scaling {rope.kind!r} is not supported in phi3; longrope is")
    return rope


class Attention(nnx.Module):
    """Grouped-query attention; one projection holds the queries, the keys and the values."""

    def __init__(
        self, config: Phi3Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        linear = _linear(dtype, param_dtype, rngs)
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.head_dim, self.ends = config.head_dim, (queries, queries + keys)
        self.qkv_proj = linear(config.hidden_size, queries + 2 * keys)
        self.o_proj = linear(queries, config.hidden_size)

    def project(self, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, ...]:
        """x [B, T, D] -> q [B, T, H, Dh], k and v [B, T, Hkv, Dh], q and k rotated."""
        parts = jnp.split(self.qkv_proj(x), self.ends, axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in parts)
        return rotate(q, *rotation), rotate(k, *rotation), v

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        """q [B, T, H, Dh] over k, v [B, S, Hkv, Dh] -> [B, T, D]."""
        out = attend(q, k, v, mask)
        return self.o_proj(out.reshape(*out.shape[:2], -1))


class MLP(nnx.Module):
    """down(silu(gate) * up), gate and up being the halves of one projection."""

    def __init__(
        self, config: Phi3Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        linear = _linear(dtype, param_dtype, rngs)
        self.gate_up_proj = linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def narrow(self, wide: jax.Array) -> jax.Array:
        """What gate_up_proj gives, [B, T, 2 F], -> [B, T, D]."""
        gate, up = jnp.split(wide, 2, axis=-1)
        return self.down_proj(jax.nn.silu(gate) * up)


def _linear(
    dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> functools.partial[nnx.Linear]:
    """Makes the linear layers, none of which has a bias."""
    return functools.partial(
        nnx.Linear,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


class Layer(PreNormLayer):
    """One decoder layer, normalized before attention and before the MLP."""

    def __init__(self, config: Phi3Config, **options: Any) -> None:
        norm = functools.partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, **options)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, **options)

    def feed_forward(self, x: jax.Array) -> jax.Array:
        widen = cheap(lambda x: self.mlp.gate_up_proj(self.post_attention_layernorm(x)))
        wide = named("wide", widen(x))
        return x + cheap(self.mlp.narrow)(wide)


class Phi3(Decoder):
    """The whole decoder; see `Decoder`."""

    def __init__(
        self, config: Phi3Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        norm = functools.partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        super().__init__(config, Layer, norm, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def rotations(self, positions: jax.Array) -> Sequence[Rotation]:
        config = self.config
        size = config.rope.rotated(config.head_dim)
        return (rotation(config.rope, size, config.max_position_embeddings, positions),)
