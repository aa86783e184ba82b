"""The Gemma family: Gemma 1, 2 and 3, of those that see the part that reads and writes text."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
from qlora_jax.models import llama
from qlora_jax.models.activations import ACTIVATIONS
from qlora_jax.models.attention import Attention
from qlora_jax.models.config import (
    FULL,
    SLIDING,
    DecoderConfig,
    check_positive,
    layer_types,
    only,
    required,
    shared_to_hf,
    special_tokens,
)
from qlora_jax.models.decoder import Decoder, Rotation
from qlora_jax.models.masks import Mask
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.remat import cheap, named
from qlora_jax.models.rope import RopeConfig, rotation
from qlora_jax.models.typed import entry, needed

GEMMA1, GEMMA2, GEMMA3 = "gemma", "gemma2", "gemma3_text"
ARCHITECTURES = {
    GEMMA1: "GemmaForCausalLM",
    GEMMA2: "Gemma2ForCausalLM",
    GEMMA3: "Gemma3ForCausalLM",
}
"""What transformers calls the families, by their model_type."""

WITH_VISION = "gemma3"
"""The model_type of Gemma 3 with a vision tower, as its larger models are published."""

NAMES = llama.NAMES
"""Our module -> Hugging Face's."""

PREFIXES = {
    "model.": ("model.language_model.", "language_model.model."),
    "lm_head": ("language_model.lm_head",),
}
"""How names begin in files with a vision tower, of transformers 5 and before."""

UNUSED = r"(model\.)?(vision_tower|multi_modal_projector)\..*|language_model\.lm_head\.weight"
"""What else is in these; a head that is tied may be stored all the same."""

_GELU = "gelu_pytorch_tanh"
# What transformers takes where config.json has no entry: the files of Gemma 3 leave most of it out.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_DEFAULTS_OF: dict[str, dict[str, Any]] = {
    GEMMA1: {"head_dim": 256, "max_position_embeddings": 8192},
    GEMMA2: {
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    GEMMA3: {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(DecoderConfig):
    """A Gemma decoder. Field names follow config.json where it has them.

    rope is of the layers with full attention, local_rope of the sliding ones, None if it is the
    same. Queries are scaled by 1 / sqrt(query_pre_attn_scalar).
    """

    intermediate_size: int
    query_pre_attn_scalar: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    attention_bias: bool = False
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("intermediate_size", "query_pre_attn_scalar"))
        if self.head_dim % 2:
            raise QloraError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise QloraError(f"{name} is {value}, expected a number above 0")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "GemmaConfig":
        if hf["model_type"] == WITH_VISION:
            hf = _text_part(hf)
        family = hf["model_type"]
        hf = _DEFAULTS | _DEFAULTS_OF[family] | dict(hf)
        _check_supported(hf)
        sizes = required(
            hf,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
        layers = sizes["num_hidden_layers"]
        kinds, window, scalar = (FULL,) * layers, None, sizes["head_dim"]
        if family != GEMMA1:
            every = needed(hf, "sliding_window_pattern", int)
            if every < 1:
                raise QloraError(f"sliding_window_pattern is {every}, expected at least 1")
            kinds = layer_types(hf, [SLIDING if (i + 1) % every else FULL for i in range(layers)])
            window = entry(hf, "sliding_window", int)
            scalar = needed(hf, "query_pre_attn_scalar", int)
        rope, local_rope = _ropes(hf) if family == GEMMA3 else (RopeConfig.from_hf(hf), None)
        return cls(
            **sizes,
            model_type=family,
            layer_types=kinds,
            sliding_window=window,
            query_pre_attn_scalar=scalar,
            rms_norm_eps=needed(hf, "rms_norm_eps", float),
            rope=rope,
            local_rope=local_rope,
            attention_bias=entry(hf, "attention_bias", bool, False),
            attn_logit_softcapping=entry(hf, "attn_logit_softcapping", float),
            final_logit_softcapping=entry(hf, "final_logit_softcapping", float),
            tie_word_embeddings=needed(hf, "tie_word_embeddings", bool),
            **special_tokens(hf),
        )

    def to_hf(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            **shared_to_hf(self),
            "architectures": [ARCHITECTURES[self.model_type]],
            "intermediate_size": self.intermediate_size,
            "hidden_activation": _GELU,
            "rms_norm_eps": self.rms_norm_eps,
            **self.rope.entries_to_hf(),
            "attention_bias": self.attention_bias,
        }
        if self.model_type == GEMMA1:
            return out | {"hidden_act": _GELU}
        if self.local_rope is not None:
            out["rope_local_base_freq"] = self.local_rope.theta
            out["rope_parameters"] = {FULL: self.rope.to_hf(), SLIDING: self.local_rope.to_hf()}
        return out | {
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
            "attn_logit_softcapping": self.attn_logit_softcapping,
            "final_logit_softcapping": self.final_logit_softcapping,
            "sliding_window": self.sliding_window,
            "layer_types": list(self.layer_types),
        }


def _text_part(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the text model alone, and what is said beside it of the whole."""
    whole = {key: hf[key] for key in ("eos_token_id", "tie_word_embeddings") if key in hf}
    return {**needed(hf, "text_config", Mapping), **whole, "model_type": GEMMA3}


def _check_supported(hf: Mapping[str, Any]) -> None:
    if entry(hf, "use_bidirectional_attention", bool, False):
        raise QloraError("use_bidirectional_attention is not supported; only causal models are")
    if hf["model_type"] == GEMMA1:
        # Early files of Gemma 1 say gelu, by which they mean the one by tanh.
        for key in ("hidden_act", "hidden_activation"):
            if hf.get(key) not in (None, "gelu"):
                only(hf, **{key: _GELU})
        return
    only(hf, hidden_activation=_GELU)
    if hf["model_type"] == GEMMA3:
        only(hf, attn_logit_softcapping=None)


def _ropes(hf: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """Gemma 3's rotary embeddings, of full and of sliding attention.

    As two entries of rope_parameters (transformers 5), or spread over config.json (before).
    """
    by_kind = entry(hf, "rope_parameters", Mapping, {})
    if strangers := sorted(set(by_kind) - {FULL, SLIDING}):
        raise QloraError(f"rope_parameters has {strangers}, expected {FULL} and {SLIDING}")
    full = {"rope_parameters": by_kind.get(FULL)}
    local = {
        "rope_parameters": by_kind.get(SLIDING),
        "rope_scaling": None,
        "rope_theta": hf["rope_local_base_freq"],
    }
    return RopeConfig.from_hf({**hf, **full}), RopeConfig.from_hf({**hf, **local})


class Layer(nnx.Module):
    """One decoder layer, normalized before attention and before the MLP.

    From Gemma 2 on also after each of them.
    """

    def __init__(
        self, config: GemmaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = functools.partial(RMSNorm, eps=config.rms_norm_eps, from_one=True)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping
        self.sandwich = config.model_type != GEMMA1
        self.input_layernorm = norm(config.hidden_size)
        self.self_attn = Attention(
            config,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            qk_norm=functools.partial(norm, config.head_dim)
            if config.model_type == GEMMA3
            else None,
            **options,
        )
        self.post_attention_layernorm = norm(config.hidden_size)
        if self.sandwich:
            self.pre_feedforward_layernorm = norm(config.hidden_size)
            self.post_feedforward_layernorm = norm(config.hidden_size)
        self.mlp = llama.MLP(
            config.hidden_size, config.intermediate_size, activation=ACTIVATIONS[_GELU], **options
        )

    def project(self, x: jax.Array, rotation: Rotation | None) -> tuple[jax.Array, ...]:
        return self.self_attn.project(self.input_layernorm(x), rotation)

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask
    ) -> jax.Array:
        out = self.self_attn.attend(q, k, v, mask, scale=self.scale, softcap=self.softcap)
        return x + (self.post_attention_layernorm(out) if self.sandwich else out)

    def feed_forward(self, x: jax.Array) -> jax.Array:
        before = self.pre_feedforward_layernorm if self.sandwich else self.post_attention_layernorm
        gate, up = named("wide", cheap(lambda x: self.mlp.widen(before(x)))(x))
        out = cheap(self.mlp.narrow)(gate, up)
        return x + (self.post_feedforward_layernorm(out) if self.sandwich else out)


class Gemma(Decoder):
    """The whole decoder; see `Decoder`."""

    def __init__(
        self, config: GemmaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        norm = functools.partial(RMSNorm, config.hidden_size, config.rms_norm_eps, from_one=True)
        super().__init__(config, Layer, norm, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def embed(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed_tokens(input_ids)
        # Rounded as in training: in bf16 the root of 3072 is 55.5.
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)

    def rotations(self, positions: jax.Array) -> Sequence[Rotation]:
        config = self.config
        ropes = [config.rope] if config.local_rope is None else [config.rope, config.local_rope]
        context = config.max_position_embeddings
        return [rotation(rope, config.head_dim, context, positions) for rope in ropes]

    def rotation_of_layers(self) -> Sequence[int]:
        return [int(kind == SLIDING) for kind in self.config.layer_types]

    def head(self, hidden: jax.Array, *, dense: bool = False) -> jax.Array:
        """As of `Decoder`."""
        logits, cap = super().head(hidden, dense=dense), self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)
