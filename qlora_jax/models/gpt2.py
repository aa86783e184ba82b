"""GPT-2: learned positions, LayerNorm, one projection for queries, keys and values."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
from qlora_jax.models.activations import ACTIVATIONS, check_activation
from qlora_jax.models.attention import attend
from qlora_jax.models.config import (
    FULL,
    DecoderConfig,
    check_positive,
    only,
    required,
    special_tokens,
    special_tokens_to_hf,
)
from qlora_jax.models.decoder import Decoder, Rotation
from qlora_jax.models.masks import Mask
from qlora_jax.models.norm import LayerNorm
from qlora_jax.models.remat import cheap, named
from qlora_jax.models.typed import entry

NAMES = {
    "embed_tokens": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "layers": "transformer.h.{}",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
"""Our module -> Hugging Face's, {} being the layer's number; what is inside has the same names."""

AS_STORED = frozenset({"c_attn", "c_proj", "c_fc"})
"""Linear modules whose weights are [in, out] in files, transformers' Conv1D."""

PREFIXES = {"transformer.": ("",)}
"""Files of the model without its head, such as the first ones published, have bare names."""

UNUSED = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
"""Tensors that such files have besides parameters: the causal mask, once for every layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(DecoderConfig):
    """A GPT-2. Fields that all decoders have are named as there, the others as in config.json.

    intermediate_size is n_inner. scale_attn_weights: scores are divided by sqrt(head_dim);
    scale_attn_by_inverse_layer_idx: also by the number of the layer, from 1. What
    reorder_and_upcast_attn asks for, scores and softmax in fp32, is done here in any case.
    """

    intermediate_size: int
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("intermediate_size",))
        check_activation("activation_function", self.activation_function)
        if self.hidden_size != self.num_attention_heads * self.head_dim:
            raise QloraError(
                f"n_embd {self.hidden_size} is not a multiple of n_head {self.num_attention_heads}"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "GPT2Config":
        sizes = required(hf, "vocab_size", "n_embd", "n_layer", "n_head")
        only(hf, add_cross_attention=False)
        width, heads = sizes["n_embd"], sizes["n_head"]
        return cls(
            model_type=hf["model_type"],
            vocab_size=sizes["vocab_size"],
            hidden_size=width,
            num_hidden_layers=sizes["n_layer"],
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=width // max(heads, 1),
            layer_types=(FULL,) * sizes["n_layer"],
            max_position_embeddings=entry(hf, "n_positions", int, 1024),
            intermediate_size=entry(hf, "n_inner", int, 4 * width),
            activation_function=entry(hf, "activation_function", str, "gelu_new"),
            layer_norm_epsilon=entry(hf, "layer_norm_epsilon", float, 1e-5),
            scale_attn_weights=entry(hf, "scale_attn_weights", bool, True),
            scale_attn_by_inverse_layer_idx=entry(
                hf, "scale_attn_by_inverse_layer_idx", bool, False
            ),
            reorder_and_upcast_attn=entry(hf, "reorder_and_upcast_attn", bool, False),
            tie_word_embeddings=entry(hf, "tie_word_embeddings", bool, True),
            **special_tokens({"bos_token_id": 50256, "eos_token_id": 50256, **hf}),
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "n_embd": self.hidden_size,
            "n_layer": self.num_hidden_layers,
            "n_head": self.num_attention_heads,
            "n_positions": self.max_position_embeddings,
            "n_inner": self.intermediate_size,
            "activation_function": self.activation_function,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "scale_attn_weights": self.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
            "reorder_and_upcast_attn": self.reorder_and_upcast_attn,
            "tie_word_embeddings": self.tie_word_embeddings,
            **special_tokens_to_hf(self),
        }


class Attention(nnx.Module):
    """Self-attention; c_attn makes queries, keys and values, in this order."""

    def __init__(self, config: GPT2Config, **options: Any) -> None:
        linear = functools.partial(nnx.Linear, **options)
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.c_attn = linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = linear(config.hidden_size, config.hidden_size)

    def project(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """x [B, T, D] -> q, k and v, [B, T, H, Dh] each."""
        q, k, v = jnp.split(self.c_attn(x).reshape(*x.shape[:2], -1, self.head_dim), 3, axis=2)
        return q, k, v

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        """q [B, T, H, Dh] over k, v [B, S, H, Dh] -> [B, T, D]; mask as for `attend`."""
        out = attend(q, k, v, mask, scale=self.scale)
        return self.c_proj(out.reshape(*out.shape[:2], -1))


class MLP(nnx.Module):
    """c_proj(activation(c_fc(x)))."""

    def __init__(self, config: GPT2Config, **options: Any) -> None:
        linear = functools.partial(nnx.Linear, **options)
        self.activation = ACTIVATIONS[config.activation_function]
        self.c_fc = linear(config.hidden_size, config.intermediate_size)
        self.c_proj = linear(config.intermediate_size, config.hidden_size)

    def narrow(self, x: jax.Array) -> jax.Array:
        """What c_fc made, [B, T, F] -> [B, T, D]."""
        return self.c_proj(self.activation(x))


class Layer(nnx.Module):
    """One decoder layer, normalized before attention and before the MLP."""

    def __init__(
        self, config: GPT2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        options["kernel_init"] = nnx.initializers.normal(0.02)
        self.ln_1 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config, **options)
        self.ln_2 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config, **options)

    def project(self, x: jax.Array, rotation: Rotation | None) -> tuple[jax.Array, ...]:
        return self.attn.project(self.ln_1(x))

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask
    ) -> jax.Array:
        return x + self.attn.attend(q, k, v, mask)

    def feed_forward(self, x: jax.Array) -> jax.Array:
        wide = named("wide", cheap(lambda x: self.mlp.c_fc(self.ln_2(x)))(x))
        return x + cheap(self.mlp.narrow)(wide)


class GPT2(Decoder):
    """The whole decoder; see `Decoder`. Positions from max_position_embeddings on give NaN."""

    def __init__(
        self, config: GPT2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        norm = functools.partial(LayerNorm, config.hidden_size, config.layer_norm_epsilon)
        super().__init__(config, Layer, norm, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.embed_positions = nnx.Embed(
            config.max_position_embeddings,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def embed(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        return self.embed_tokens(input_ids) + self.embed_positions(positions)

    def query_scales(self) -> Sequence[float] | None:
        if not self.config.scale_attn_by_inverse_layer_idx:
            return None
        return [1 / (layer + 1) for layer in range(self.config.num_hidden_layers)]
