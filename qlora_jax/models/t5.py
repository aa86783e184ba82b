"""The T5 family: T5, T5 v1.1 and FLAN-T5, encoder-decoders with relative positions.

Letters: B batch, T time, E time of the encoder, S slots of keys, D model, F hidden of the
feed-forward, H heads, Dh size of a head, V vocabulary, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
from qlora_jax.models.cache import EncoderDecoderCache, check_room
from qlora_jax.models.dot_product import dot_product_attention
from qlora_jax.models.logits import logits, table_logits
from qlora_jax.models.masks import causal_mask
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.remat import Remat, cheap, named, rematerialized
from qlora_jax.models.t5_config import T5Config

NAMES = {
    "shared": "shared",
    "encoder/block/self_attention": "encoder.block.{}.layer.0.SelfAttention",
    "encoder/block/self_attention_norm": "encoder.block.{}.layer.0.layer_norm",
    "encoder/block/feed_forward": "encoder.block.{}.layer.1.DenseReluDense",
    "encoder/block/feed_forward_norm": "encoder.block.{}.layer.1.layer_norm",
    "encoder/relative_attention_bias": (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    ),
    "encoder/final_layer_norm": "encoder.final_layer_norm",
    "decoder/block/self_attention": "decoder.block.{}.layer.0.SelfAttention",
    "decoder/block/self_attention_norm": "decoder.block.{}.layer.0.layer_norm",
    "decoder/block/cross_attention": "decoder.block.{}.layer.1.EncDecAttention",
    "decoder/block/cross_attention_norm": "decoder.block.{}.layer.1.layer_norm",
    "decoder/block/feed_forward": "decoder.block.{}.layer.2.DenseReluDense",
    "decoder/block/feed_forward_norm": "decoder.block.{}.layer.2.layer_norm",
    "decoder/relative_attention_bias": (
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    ),
    "decoder/final_layer_norm": "decoder.final_layer_norm",
    "lm_head": "lm_head",
}
"""Our module -> Hugging Face's, {} being the layer's number; what is inside has the same names."""

UNUSED = (
    r"(encoder|decoder)\.embed_tokens\.weight"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
"""Tensors in files that repeat `shared`, and one of the first release that nothing uses."""

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def _linear(inputs: int, outputs: int, std: float, options: dict[str, Any]) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, **options)


class Attention(nnx.Module):
    """q, k, v, o projections; scores are not scaled by the size of a head, initial weights are."""

    def __init__(self, config: T5Config, options: dict[str, Any]) -> None:
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.d_kv = config.d_kv
        self.q = _linear(width, inner, (width * config.d_kv) ** -0.5, options)
        self.k = _linear(width, inner, width**-0.5, options)
        self.v = _linear(width, inner, width**-0.5, options)
        self.o = _linear(inner, width, inner**-0.5, options)

    def queries(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, H, Dh]."""
        return self._heads(self.q(x))

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, S, D] -> keys and values, [B, S, H, Dh]."""
        return self._heads(self.k(x)), self._heads(self.v(x))

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        bias: jax.Array | None,
        mask: jax.Array | None,
    ) -> jax.Array:
        """q [B, T, H, Dh] over k, v [B, S, H, Dh] -> [B, T, D].

        bias, fp32 [1, H, T, S], is added to the scores; mask, bool [B or 1, 1, T, S], is False
        where a query must not look (None: it may look everywhere).
        """
        out = _attend(q, k, v, bias, mask)
        return self.o(out.reshape(*out.shape[:2], -1))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, self.d_kv)


# Only q, k and v are kept for the backward pass, as in the attention of decoders.
@cheap
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, mask: jax.Array | None
) -> jax.Array:
    return dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)


class FeedForward(nnx.Module):
    """wo(act(wi(x))), or gated wo(act(wi_0(x)) * wi_1(x))."""

    def __init__(self, config: T5Config, options: dict[str, Any]) -> None:
        width, hidden = config.d_model, config.d_ff
        self.gated = config.is_gated_act
        self.act = _ACTIVATIONS[config.dense_act_fn]
        if self.gated:
            self.wi_0 = _linear(width, hidden, width**-0.5, options)
            self.wi_1 = _linear(width, hidden, width**-0.5, options)
        else:
            self.wi = _linear(width, hidden, width**-0.5, options)
        self.wo = _linear(hidden, width, hidden**-0.5, options)

    def widen(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """x [B, T, D] -> one [B, T, F], or gated two."""
        return (self.wi_0(x), self.wi_1(x)) if self.gated else (self.wi(x),)

    def narrow(self, first: jax.Array, *gated: jax.Array) -> jax.Array:
        """What `widen` gave -> [B, T, D]."""
        return self.wo(functools.reduce(jnp.multiply, gated, self.act(first)))


class Block(nnx.Module):
    """Self-attention, in the decoder cross-attention, feed-forward; each is normalized before."""

    def __init__(self, config: T5Config, is_decoder: bool, options: dict[str, Any]) -> None:
        norm = functools.partial(RMSNorm, config.d_model, config.layer_norm_epsilon)
        self.self_attention_norm = norm()
        self.self_attention = Attention(config, options)
        if is_decoder:
            self.cross_attention_norm = norm()
            self.cross_attention = Attention(config, options)
        self.feed_forward_norm = norm()
        self.feed_forward = FeedForward(config, options)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> q, k, v of self-attention, [B, T, H, Dh]."""
        x = self.self_attention_norm(x)
        return self.self_attention.queries(x), *self.self_attention.keys_values(x)

    def cross_queries(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, H, Dh]."""
        return self.cross_attention.queries(self.cross_attention_norm(x))

    def feed(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] and what the feed-forward adds to it."""
        widen = cheap(lambda x: self.feed_forward.widen(self.feed_forward_norm(x)))
        wide = named("wide", widen(x))
        return x + cheap(self.feed_forward.narrow)(*wide)


class Stack(nnx.Module):
    """The encoder or the decoder: blocks on a leading axis [L, ...], one position bias for all."""

    def __init__(
        self, config: T5Config, layers: int, is_decoder: bool, options: dict[str, Any]
    ) -> None:
        rngs = options["rngs"]

        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(config, is_decoder, options | {"rngs": rngs})

        self.block = stacked(rngs)
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            embedding_init=nnx.initializers.normal(config.d_model**-0.5),
            dtype=jnp.float32,
            param_dtype=options["param_dtype"],
            rngs=rngs,
        )
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.buckets = functools.partial(
            relative_buckets,
            buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
            bidirectional=not is_decoder,
        )

    def bias(self, queries: jax.Array, slots: int) -> jax.Array:
        """What is added to scores, fp32 [1, H, T, S]; queries [T] is the slot of each query."""
        table = self.relative_attention_bias(self.buckets(jnp.arange(slots) - queries[:, None]))
        return jnp.moveaxis(table, -1, 0)[None]

    def cross_keys_values(self, encoded: jax.Array) -> tuple[jax.Array, jax.Array]:
        """encoded [B, E, D] -> what cross-attention looks at in every layer, [L, B, E, H, Dh]."""
        graphdef, stacked = nnx.split(self.block.cross_attention)

        def step(_: None, state: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
            return None, nnx.merge(graphdef, state).keys_values(encoded)

        return jax.lax.scan(step, None, stacked)[1]

    def run(
        self,
        x: jax.Array,
        bias: jax.Array,
        mask: jax.Array | None,
        *,
        encoded: jax.Array | None = None,
        encoded_mask: jax.Array | None = None,
        cache: EncoderDecoderCache | None = None,
        remat: Remat = "none",
    ) -> tuple[jax.Array, EncoderDecoderCache | None]:
        """x [B, T, D] through all blocks and the last norm, and the extended cache.

        The decoder attends to `encoded`, or to what `cache` has of it: one of the two is given.
        """
        graphdef, stacked = nnx.split(self.block)

        def block_step(carry: Any, xs: Any) -> tuple[Any, None]:
            x, keys, values = carry
            x = named("layer_input", x)
            state, number, cross = xs
            block = nnx.merge(graphdef, state)
            q, k, v = cheap(block.project)(x)
            q, k, v = named("query", q), named("key", k), named("value", v)
            if cache is not None:
                place = (number, 0, cache.index, 0, 0)
                keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), place)
                values = jax.lax.dynamic_update_slice(values, v[None].astype(keys.dtype), place)
                k, v = keys[number].astype(q.dtype), values[number].astype(q.dtype)
            x = named("attended", x + block.self_attention.attend(q, k, v, bias, mask))
            if encoded is not None:
                k, v = cheap(block.cross_attention.keys_values)(encoded)
                cross = named("key", k), named("value", v)
            if cross is not None:
                q = named("query", cheap(block.cross_queries)(x))
                k, v = (y.astype(q.dtype) for y in cross)
                x = named("attended", x + block.cross_attention.attend(q, k, v, None, encoded_mask))
            return (block.feed(x), keys, values), None

        step = rematerialized(block_step, remat)
        # As in `Decoder`, the buffers that are written to travel in the carry.
        own, cross = (None, None), None
        if cache is not None:
            own, cross = (cache.k, cache.v), (cache.cross_k, cache.cross_v)
        layers = jax.tree.leaves(stacked)[0].shape[0]
        (x, keys, values), _ = jax.lax.scan(step, (x, *own), (stacked, jnp.arange(layers), cross))
        if cache is not None:
            cache = dataclasses.replace(cache, k=keys, v=values, index=cache.index + x.shape[1])
        return self.final_layer_norm(x), cache


class T5(nnx.Module):
    """The whole model. `nnx.state` of it is the parameter tree."""

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(1.0)
        self.config = config
        self.dtype = dtype
        self.shared = nnx.Embed(config.vocab_size, config.d_model, embedding_init=init, **options)
        self.encoder = Stack(config, config.num_layers, False, options)
        self.decoder = Stack(config, config.num_decoder_layers, True, options)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.d_model,
                config.vocab_size,
                use_bias=False,
                kernel_init=init,
                preferred_element_type=jnp.float32,
                **options,
            )

    def encode(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        remat: Remat = "none",
    ) -> jax.Array:
        """input_ids [B, E] -> [B, E, D].

        attention_mask [B, E]: zero on padding, on either side; segment_ids [B, E]: documents packed
        in a row, where a token sees its own document only.
        """
        time = input_ids.shape[1]
        bias = self.encoder.bias(jnp.arange(time), time)
        mask = _mask(attention_mask, segment_ids, segment_ids, time)
        return self.encoder.run(self.shared(input_ids), bias, mask, remat=remat)[0]

    def decode(
        self,
        decoder_input_ids: jax.Array,
        encoded: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        remat: Remat = "none",
    ) -> jax.Array:
        """decoder_input_ids [B, T] after encoded [B, E, D] -> [B, T, D], for `head`.

        attention_mask and segment_ids [B, E] are those of `encode`. decoder_attention_mask [B, T]:
        zero on padding; decoder_segment_ids [B, T]: the segment that each token goes with.
        """
        if (segment_ids is None) != (decoder_segment_ids is None):
            raise QloraError("segment_ids and decoder_segment_ids: give both or none")
        time = decoder_input_ids.shape[1]
        slots = jnp.arange(time)
        mask = causal_mask(slots, time, None)
        here = _mask(decoder_attention_mask, decoder_segment_ids, decoder_segment_ids, time)
        return self.decoder.run(
            self.shared(decoder_input_ids),
            self.decoder.bias(slots, time),
            mask if here is None else mask & here,
            encoded=encoded,
            encoded_mask=_mask(attention_mask, decoder_segment_ids, segment_ids, time),
            remat=remat,
        )[0]

    def new_cache(
        self, encoded: jax.Array, length: int, *, attention_mask: jax.Array | None = None
    ) -> EncoderDecoderCache:
        """For decoding up to `length` tokens after encoded [B, E, D], of whose mask [B, E]."""
        if attention_mask is None:
            attention_mask = jnp.ones(encoded.shape[:2], bool)
        cross_k, cross_v = self.decoder.cross_keys_values(encoded)
        layers, batch, _, *heads = cross_k.shape
        empty = jnp.zeros((layers, batch, length, *heads), cross_k.dtype)
        valid = attention_mask.astype(bool)
        return EncoderDecoderCache(empty, empty, cross_k, cross_v, valid, jnp.zeros((), jnp.int32))

    def extend(
        self, decoder_input_ids: jax.Array, cache: EncoderDecoderCache
    ) -> tuple[jax.Array, EncoderDecoderCache]:
        """The next tokens [B, T] of every row -> [B, T, D], for `head`, and the extended cache."""
        batch, time = decoder_input_ids.shape
        check_room(cache, batch, time)
        slots = cache.index + jnp.arange(time)
        hidden, cache_after = self.decoder.run(
            self.shared(decoder_input_ids),
            self.decoder.bias(slots, cache.length),
            causal_mask(slots, cache.length, None),
            encoded_mask=_mask(cache.valid, None, None, time),
            cache=cache,
        )
        assert cache_after is not None
        return hidden, cache_after

    def head(self, hidden: jax.Array, *, dense: bool = False) -> jax.Array:
        """hidden [..., D] of the decoder -> logits [..., V]; the rest as of `Decoder`."""
        if self.config.scale_decoder_outputs:
            hidden = hidden * jnp.asarray(self.config.d_model**-0.5, hidden.dtype)
        if self.config.tie_word_embeddings:
            return table_logits(hidden, self.shared.embedding[...], dense=dense)
        return logits(hidden, self.lm_head.kernel[...], 0) if dense else self.lm_head(hidden)


def _mask(
    valid: jax.Array | None,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    queries: int,
) -> jax.Array | None:
    """bool [B, 1, T, S]: keys that are no padding, of the query's own segment; None: all."""
    mask = None
    if valid is not None:
        batch, keys = valid.shape
        mask = jnp.broadcast_to(valid.astype(bool)[:, None, None], (batch, 1, queries, keys))
    if query_segments is not None and key_segments is not None:
        same = (query_segments[:, :, None] == key_segments[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return mask


def relative_buckets(
    distance: jax.Array, *, buckets: int, max_distance: int, bidirectional: bool
) -> jax.Array:
    """The bucket, int32 in [0, buckets), of distance = key's position - query's.

    Near distances have a bucket each; the far half of the buckets grows logarithmically up to
    `max_distance`, and the last one takes all beyond (arXiv:1910.10683, section 2.1). Both ways:
    one half of the buckets is for keys before the query and one for keys after it; otherwise later
    keys share the bucket of the query itself.
    """
    offset: Any = 0
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    table = jnp.asarray(_bucket_table(buckets, max_distance))
    place = jnp.minimum(distance, max_distance)
    return offset + table.at[place].get(mode="promise_in_bounds")


@functools.cache
def _bucket_table(buckets: int, max_distance: int) -> np.ndarray:
    """int32 [max_distance + 1]: bucket of every distance; in fp32, as T5 was trained."""
    near = buckets // 2
    distances = np.arange(max_distance + 1)
    steps = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(near))
    steps = steps / np.float32(np.log(max_distance / near)) * np.float32(buckets - near)
    far = np.minimum(near + steps.astype(np.int32), buckets - 1)
    return np.where(distances < near, distances, far).astype(np.int32)
