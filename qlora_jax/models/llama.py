"""The Llama family: Llama 1 to 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
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
from qlora_jax.models.decoder import Decoder, PreNormLayer, Rotation
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.remat import cheap, named
from qlora_jax.models.rope import RopeConfig, rotation
from qlora_jax.models.typed import entry

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""What transformers calls the families, by their model_type."""

_QKVO_BIAS, _MLP_BIAS = ("llama", "qwen3", "smollm3"), ("llama", "smollm3")
_LAYER_TYPES = ("qwen2", "qwen3", "smollm3")
"""Which families' config.json has attention_bias, mlp_bias and layer_types."""

NAMES = {
    "embed_tokens": "model.embed_tokens",
    "layers": "model.layers.{}",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
"""Our module -> Hugging Face's, {} being the layer's number; what is inside has the same names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """A Llama-family decoder. Field names follow config.json where it has them.

    qkv_bias, o_bias, mlp_bias, qk_norm spell out what in Hugging Face depends on the family.
    """

    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("intermediate_size",))
        if self.head_dim % 2:
            raise QloraError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        family = hf["model_type"]
        sizes = required(
            hf,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        only(hf, hidden_act="silu")
        heads, layers = sizes["num_attention_heads"], sizes["num_hidden_layers"]
        head_dim = entry(hf, "head_dim", int)
        if head_dim is None:
            head_dim = 128 if family == "qwen3" else sizes["hidden_size"] // max(heads, 1)
        window, kinds = _windows(family, hf, layers)
        attention_bias = entry(hf, "attention_bias", bool, False) and family in _QKVO_BIAS
        usual_kv_heads = 8 if family == "mistral" and "num_key_value_heads" not in hf else heads
        return cls(
            **sizes,
            model_type=family,
            num_key_value_heads=entry(hf, "num_key_value_heads", int, usual_kv_heads),
            head_dim=head_dim,
            layer_types=kinds,
            sliding_window=window,
            max_position_embeddings=entry(hf, "max_position_embeddings", int, 2048),
            rms_norm_eps=entry(hf, "rms_norm_eps", float, 1e-6),
            rope=RopeConfig.from_hf(hf),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=entry(hf, "mlp_bias", bool, False) and family in _MLP_BIAS,
            qk_norm=family == "qwen3",
            tie_word_embeddings=entry(hf, "tie_word_embeddings", bool, False),
            **special_tokens(hf),
        )

    def to_hf(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            **shared_to_hf(self),
            "architectures": [ARCHITECTURES[self.model_type]],
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            **self.rope.entries_to_hf(),
        }
        if self.model_type in _QKVO_BIAS:
            out["attention_bias"] = self.qkv_bias
        if self.model_type in _MLP_BIAS:
            out["mlp_bias"] = self.mlp_bias
        if self.model_type == "mistral" or self.model_type in _LAYER_TYPES:
            out["sliding_window"] = self.sliding_window
        if self.model_type in _LAYER_TYPES:
            out["use_sliding_window"] = self.sliding_window is not None
            out["layer_types"] = list(self.layer_types)
        return out


def _windows(family: str, hf: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[str, ...]]:
    """The window and which layers use it: all of Mistral, the upper ones of Qwen, none of Llama."""
    if family == "llama":
        return None, (FULL,) * layers
    # No entry means 4096 to transformers, null means no window.
    window = entry(hf, "sliding_window", int, None if "sliding_window" in hf else 4096)
    if family == "mistral":
        return window, ((SLIDING if window else FULL),) * layers
    if not entry(hf, "use_sliding_window", bool, False):
        window = None
    first = entry(hf, "max_window_layers", int, 28)
    usual = [SLIDING if window and i >= first else FULL for i in range(layers)]
    return window, layer_types(hf, usual)


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), from D features to F and back."""

    def __init__(
        self,
        width: int,
        inner: int,
        *,
        use_bias: bool = False,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        linear = functools.partial(
            nnx.Linear,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.gate_proj = linear(width, inner)
        self.up_proj = linear(width, inner)
        self.down_proj = linear(inner, width)
        self.activation = activation

    def widen(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D] -> gate and up, [B, T, F]."""
        return self.gate_proj(x), self.up_proj(x)

    def narrow(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """gate and up [B, T, F] -> [B, T, D]."""
        return self.down_proj(self.activation(gate) * up)


class Layer(PreNormLayer):
    """One decoder layer, normalized before attention and before the MLP."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        head_norm = functools.partial(RMSNorm, config.head_dim, config.rms_norm_eps)
        self.self_attn = Attention(
            config,
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
            qk_norm=head_norm if config.qk_norm else None,
            **options,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: Any = self.make_mlp(config, **options)

    def make_mlp(self, config: Any, **options: Any) -> nnx.Module:
        return MLP(
            config.hidden_size, config.intermediate_size, use_bias=config.mlp_bias, **options
        )

    def feed_forward(self, x: jax.Array) -> jax.Array:
        widen = cheap(lambda x: self.mlp.widen(self.post_attention_layernorm(x)))
        gate, up = named("wide", widen(x))
        return x + cheap(self.mlp.narrow)(gate, up)


class Llama(Decoder):
    """The whole decoder; see `Decoder`."""

    layer: ClassVar[Any] = Layer

    def __init__(
        self, config: Any, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        norm = functools.partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        super().__init__(config, self.layer, norm, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def rotations(self, positions: jax.Array) -> Sequence[Rotation]:
        config = self.config
        return (rotation(config.rope, config.head_dim, config.max_position_embeddings, positions),)
