"""What all decoder-only families share: stacked layers under a scan, masks, cache, output head.

Letters: B batch, T time, S cache slots, D model, V vocabulary, H heads, Dh size of a head.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.models.cache import Cache, check_room
from qlora_jax.models.config import FULL, DecoderConfig
from qlora_jax.models.logits import logits, table_logits
from qlora_jax.models.masks import Mask
from qlora_jax.models.positions import count_positions
from qlora_jax.models.remat import Remat, cheap, named, rematerialized
from qlora_jax.models.stacks import scan_layers, stack

Rotation = tuple[jax.Array, jax.Array]
"""Cosine and sine, fp32 [B, T, Dh/2]."""


class DecoderLayer(Protocol):
    """What `Decoder` asks of one layer."""

    def project(
        self, x: jax.Array, rotation: Rotation | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> q [B, T, H, Dh], k and v [B, T, Hkv, Dh], as attention takes them."""
        ...

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask
    ) -> jax.Array:
        """x [B, T, D] and what attention adds to it."""
        ...

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] and what the MLP adds to it."""
        ...


class PreNormLayer(nnx.Module):
    """The half of a layer that is normalized before attention, as most families have it."""

    input_layernorm: Any
    self_attn: Any

    def project(self, x: jax.Array, rotation: Rotation | None) -> tuple[jax.Array, ...]:
        return self.self_attn.project(self.input_layernorm(x), rotation)

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask
    ) -> jax.Array:
        return x + self.self_attn.attend(q, k, v, mask)


class Decoder(nnx.Module):
    """The whole decoder. `nnx.state` of it is the parameter tree, layers stacked as [L, ...].

    A family overrides `embed`, `rotations`, `rotation_of_layers`, `query_scales` or `head` where it
    differs, and `measure` and `extra_loss` where more is learned from than the tokens. Layers of
    another kind than `layers` are a stack of their own, by the name that `config.stacks` has.
    """

    def __init__(
        self,
        config: Any,
        make_layer: Callable[..., Any],
        make_norm: Callable[[], nnx.Module],
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        init = nnx.initializers.normal(0.02)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}

        def layer(rngs: nnx.Rngs) -> Any:
            return make_layer(config, **options, rngs=rngs)

        self.config = config
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=init, **options, rngs=rngs
        )
        self.layers = stack(layer, len(config.stacks["layers"]), rngs)
        self.norm: Any = make_norm()
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                kernel_init=init,
                preferred_element_type=jnp.float32,
                **options,
                rngs=rngs,
            )

    def embed(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """input_ids and positions [B, T] -> the first layer's input [B, T, D]."""
        return self.embed_tokens(input_ids)

    def rotations(self, positions: jax.Array) -> Sequence[Rotation]:
        """The rotary embeddings that the layers use; none: positions are not rotated."""
        return ()

    def rotation_of_layers(self) -> Sequence[int]:
        """Which of `rotations` each layer uses."""
        return (0,) * self.config.num_hidden_layers

    def query_scales(self) -> Sequence[float] | None:
        """What each layer's queries are multiplied by, beyond the scale that all of them have."""
        return None

    def measure(self, layer: Any, x: jax.Array, real: jax.Array | None) -> Any:
        """What `extra_loss` needs of a layer: a pytree. x [B, T, D] goes into its MLP; real [B, T]:
        the token is no padding (None: none is)."""
        return None

    def extra_loss(self, measured: Sequence[Any]) -> jax.Array | None:
        """What is learned beside the mean loss of the tokens, fp32 []: of all that was measured,
        each entry of several layers, leaves [layers, ...]."""
        return None

    def hidden(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        remat: Remat = "none",
    ) -> tuple[jax.Array, Cache | None, jax.Array | None]:
        """Final, normalized hidden states [B, T, D]; see `families.apply_hidden`."""
        config, (batch, time) = self.config, input_ids.shape
        start = jnp.zeros((), jnp.int32) if cache is None else cache.index
        valid = real = None if attention_mask is None else attention_mask.astype(bool)
        if positions is None:
            positions = count_positions(valid, segment_ids, batch, time)
            if cache is not None:
                positions = positions + cache.positions[:, None]
        rotations = self.rotations(positions)

        slots = time if cache is None else cache.length
        if cache is not None:
            if segment_ids is not None:
                raise ValueError("packed sequences have no cache; give each a row of its own")
            check_room(cache, batch, time)
            new = jnp.ones((batch, time), bool) if valid is None else valid
            valid = jax.lax.dynamic_update_slice(cache.valid, new, (0, start))
        window, slides = _windows(config, slots)
        mask = Mask(
            valid=valid,
            segment_ids=segment_ids,
            start=None if cache is None else start,
            window=window,
        )

        def layer_step(graphdef: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
            x, keys, values = carry
            x = named("layer_input", x)
            state, (number, slides, kind, scale) = xs
            layer: DecoderLayer = nnx.merge(graphdef, state)
            rotation = None if not rotations else rotations[0]
            if kind is not None:
                rotation = jax.tree.map(lambda *kinds: jnp.stack(kinds)[kind], *rotations)
            q, k, v = cheap(lambda x: layer.project(x, rotation))(x)
            q, k, v = named("query", q), named("key", k), named("value", v)
            if scale is not None:
                q = q * scale.astype(q.dtype)
            if cache is not None:
                place = (number, 0, start, 0, 0)
                keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), place)
                values = jax.lax.dynamic_update_slice(values, v[None].astype(keys.dtype), place)
                k, v = keys[number].astype(q.dtype), values[number].astype(q.dtype)
            here = dataclasses.replace(mask, slides=slides)
            x = named("attended", layer.attend(x, q, k, v, here))
            measured = self.measure(layer, x, real)
            return (layer.feed_forward(x), keys, values), measured

        steps, states = {}, {}
        for name in config.stacks:
            graphdef, states[name] = nnx.split(getattr(self, name))
            steps[name] = rematerialized(functools.partial(layer_step, graphdef), remat)
        # The cache travels in the carry, where XLA updates it in place; as scan inputs and outputs
        # it would be copied whole at every token.
        carry = (
            self.embed(input_ids, positions),
            *((None, None) if cache is None else (cache.k, cache.v)),
        )
        numbers = jnp.arange(config.num_hidden_layers)
        several = len(rotations) > 1
        kinds = jnp.asarray(self.rotation_of_layers(), jnp.int32) if several else None
        scales = self.query_scales()
        scales = None if scales is None else jnp.asarray(scales, jnp.float32)
        xs = (numbers, slides, kinds, scales)
        (x, keys, values), measured = scan_layers(steps, carry, states, config.stacks, xs)
        if cache is not None and valid is not None:
            cache = Cache(
                k=keys,
                v=values,
                valid=valid,
                positions=positions[:, -1] + 1,
                index=start + time,
            )
        return self.norm(x), cache, self.extra_loss(measured)

    def head(self, hidden: jax.Array, *, dense: bool = False) -> jax.Array:
        """hidden [..., D] -> logits [..., V], accumulated and returned in fp32.

        dense: the head's weight is known to be, so that `logits` computes them.
        """
        if self.config.tie_word_embeddings:
            return table_logits(hidden, self.embed_tokens.embedding[...], dense=dense)
        return logits(hidden, self.lm_head.kernel[...], 0) if dense else self.lm_head(hidden)


def _windows(config: DecoderConfig, slots: int) -> tuple[int | None, jax.Array | None]:
    """The sliding window, None where it can hide none of `slots` slots, and in which layers it
    holds, [L] bool, None for all of them."""
    sliding = [kind != FULL for kind in config.layer_types]
    window = config.sliding_window
    if window is None or slots <= window or not any(sliding):
        return None, None
    return window, None if all(sliding) else jnp.asarray(sliding)
