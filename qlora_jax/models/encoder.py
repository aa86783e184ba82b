"""What all encoders share: embeddings, layers normalized after each block, masks, the loop.

Letters: B batch, T time, D model, F hidden of the MLP, H heads, Dh size of a head, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
from qlora_jax.models.dot_product import dot_product_attention
from qlora_jax.models.encoder_config import ACTIVATIONS, EncoderConfig
from qlora_jax.models.masks import same_segment
from qlora_jax.models.norm import LayerNorm
from qlora_jax.models.remat import Remat, cheap, named, rematerialized


def linear(config: EncoderConfig, size: int, out: int, **options: Any) -> nnx.Linear:
    """A linear layer from `size` to `out` features, initialized as the family's are."""
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(size, out, kernel_init=init, **options)


class Embeddings(nnx.Module):
    """Embeddings of words, positions and token types, added up and normalized.

    width      of the tables, projected to D if it is another
    positions  whether there is a table of positions
    """

    def __init__(
        self,
        config: EncoderConfig,
        width: int,
        positions: bool,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(config.initializer_range)
        table = functools.partial(nnx.Embed, features=width, embedding_init=init, **options)
        self.word_embeddings = table(config.vocab_size)
        self.limit = config.max_position_embeddings if positions else None
        self.types = config.type_vocab_size
        if positions:
            self.position_embeddings = table(config.max_position_embeddings)
        if self.types:
            self.token_type_embeddings = table(config.type_vocab_size)
        self.projected = width != config.hidden_size
        if self.projected:
            self.embed_proj = linear(config, width, config.hidden_size, use_bias=False, **options)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(
        self, input_ids: jax.Array, positions: jax.Array, token_type_ids: jax.Array | None
    ) -> jax.Array:
        """All three [B, T] int -> [B, T, D]; token_type_ids None: all zero."""
        x = self.word_embeddings(input_ids)
        if self.limit is not None:
            x = x + self.position_embeddings(positions)
        if self.types:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embeddings(types)
        if self.projected:
            x = self.embed_proj(x)
        return self.LayerNorm(x)


class Intermediate(nnx.Module):
    """The MLP's first half, without its activation."""

    def __init__(self, config: EncoderConfig, **options: Any) -> None:
        self.dense = linear(config, config.hidden_size, config.intermediate_size, **options)


class Output(nnx.Module):
    """The end of a block: LayerNorm(dense(act(x)) + residual)."""

    def __init__(self, config: EncoderConfig, size: int, **options: Any) -> None:
        self.dense = linear(config, size, config.hidden_size, **options)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(
        self, x: jax.Array, residual: jax.Array, act: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """x [B, T, D or F], residual [B, T, D] -> [B, T, D]."""
        # Of the MLP's two [B, T, F] arrays only the one before the activation is kept.
        added = self.dense(x) if act is None else cheap(lambda x: self.dense(act(x)))(x)
        return self.LayerNorm(named("attended", added + residual))


class AttentionBlock(nnx.Module):
    """Self-attention with its output projection; `self` is the family's own part."""

    def __init__(
        self, config: EncoderConfig, attention: Callable[..., nnx.Module], **options: Any
    ) -> None:
        self.self: Any = attention(config, **options)
        self.output = Output(config, config.hidden_size, **options)


class Layer(nnx.Module):
    """One encoder layer, normalized after attention and after the MLP."""

    def __init__(
        self, config: EncoderConfig, attention: Callable[..., nnx.Module], **options: Any
    ) -> None:
        self.act = ACTIVATIONS[config.hidden_act]
        self.attention = AttentionBlock(config, attention, **options)
        self.intermediate = Intermediate(config, **options)
        self.output = Output(config, config.intermediate_size, **options)

    def __call__(self, x: jax.Array, *context: Any) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; context: what the family's attention takes beside x."""
        x = self.attention.output(self.attention.self(x, *context), x)
        return self.output(named("wide", self.intermediate.dense(x)), x, self.act)


class Stack(nnx.Module):
    """The layers, stacked on a leading axis [L, ...]."""

    def __init__(
        self, config: EncoderConfig, attention: Callable[..., nnx.Module], **options: Any
    ) -> None:
        rngs = options.pop("rngs")

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, attention, **options, rngs=rngs)

        self.depth = config.num_hidden_layers
        self.layer = stacked(rngs)

    def __call__(
        self,
        x: jax.Array,
        *context: Any,
        remat: Remat,
        after: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """x [B, T, D] through all layers.

        after: what becomes of a layer's (number, input, output), its output by default.
        """
        graphdef, stacked = nnx.split(self.layer)

        def layer_step(x: jax.Array, xs: Any) -> tuple[jax.Array, None]:
            state, number = xs
            x = named("layer_input", x)
            out = nnx.merge(graphdef, state)(x, *context)
            return out if after is None else after(number, x, out), None

        step = rematerialized(layer_step, remat)
        return jax.lax.scan(step, x, (stacked, jnp.arange(self.depth)))[0]


@cheap
def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """q, k, v [B, T, H, Dh] -> [B, T, D]; mask [B, 1, 1 or T, T]: which keys a query may see.

    Under jax.checkpoint the [B, H, T, T] probabilities are not kept for the backward pass.
    """
    return dot_product_attention(q, k, v, mask=mask).reshape(*q.shape[:2], -1)


def visible(attention_mask: jax.Array | None, segment_ids: jax.Array | None) -> jax.Array | None:
    """[B, 1, 1 or T, T] bool, or None where every token sees every other.

    attention_mask [B, T] is zero on padding, segment_ids [B, T] tells packed documents apart.
    """
    mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
    if segment_ids is None:
        return mask
    same = same_segment(segment_ids, segment_ids)
    return same if mask is None else mask & same


def check_length(time: int, limit: int | None) -> None:
    """Raises QloraError for more tokens than there are positions."""
    if limit is not None and time > limit:
        raise QloraError(f"a row has {time} tokens, the model has positions for {limit}")
