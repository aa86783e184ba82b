"""Keys and values of the tokens seen so far, in buffers of fixed size."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike

from qlora_jax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Decode state: S slots for every sequence of a batch, filled from slot 0 on.

    k, v       [L, B, S, Hkv, Dh] keys (already rotated) and values
    valid      [B, S] bool: the slot holds a token that may be attended to (not padding)
    positions  [B] int32: rotary position that each sequence's next token gets
    index      [] int32: slot that the next token goes to
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array
    positions: jax.Array
    index: jax.Array

    @classmethod
    def create(
        cls, config: DecoderConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32
    ) -> "Cache":
        """An empty cache for `batch` sequences of at most `length` tokens, padding included."""
        heads = (config.num_key_value_heads, config.head_dim)
        shape = (config.num_hidden_layers, batch, length, *heads)
        return cls(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            valid=jnp.zeros((batch, length), bool),
            positions=jnp.zeros((batch,), jnp.int32),
            index=jnp.zeros((), jnp.int32),
        )

    @property
    def length(self) -> int:
        """S, the number of slots."""
        return self.k.shape[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderDecoderCache:
    """Decode state of an encoder-decoder: S slots for its own tokens, E encoded ones to look at.

    k, v              [L, B, S, H, Dh] keys and values of the decoder's own tokens
    cross_k, cross_v  [L, B, E, H, Dh] those of the encoder's output, computed once
    valid             [B, E] bool: the encoded token is no padding
    index             [] int32: slot that the next token goes to
    """

    k: jax.Array
    v: jax.Array
    cross_k: jax.Array
    cross_v: jax.Array
    valid: jax.Array
    index: jax.Array

    @property
    def length(self) -> int:
        """S, the number of slots."""
        return self.k.shape[2]


def check_room(cache: Cache | EncoderDecoderCache, batch: int, time: int) -> None:
    """Raises ValueError if `time` tokens of `batch` sequences do not fit.

    Inside jit the slots in use are not known, so that only what never fits is noticed.
    """
    if cache.valid.shape[0] != batch:
        raise ValueError(f"the cache holds {cache.valid.shape[0]} sequences, got {batch}")
    used = 0 if isinstance(cache.index, Tracer) else int(cache.index)
    if used + time > cache.length:
        raise ValueError(
            f"the cache has {cache.length} slots, {used} in use: no room for {time} tokens more"
        )
