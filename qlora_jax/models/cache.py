"""Keys and values of the tokens seen so far, in buffers of fixed size."""

import dataclasses

import jax
import jax.numpy as jnp
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
