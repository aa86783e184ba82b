"""Which keys each query may see."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """What hides keys from queries, beside that no query sees a later key. None: nothing does.

    valid        [B, S] bool, False on padding
    segment_ids  [B, S] int, where T = S: documents packed in a row do not see each other
    start        [] int32, the key slot of the first query, where there is a cache
    window       a query sees the last `window` keys up to and including its own
    slides       [] bool: whether the window holds in this layer; None: it does

    Kept in parts: a dense mask is T x S, and a kernel wants the parts.
    """

    valid: jax.Array | None = None
    segment_ids: jax.Array | None = None
    start: jax.Array | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    slides: jax.Array | None = None

    def dense(self, first: int | jax.Array, count: int, seen: int) -> jax.Array:
        """[1 or B, 1, count, seen] bool: what queries `first` and on see of the first keys."""
        queries = jnp.arange(count) + first
        slots = queries if self.start is None else queries + self.start
        valid = None if self.valid is None else self.valid[:, :seen]
        mask = causal_mask(slots, seen, valid)
        if self.window is not None:
            near = (slots[:, None] - jnp.arange(seen)[None, :] < self.window)[None, None]
            mask = mask & (near if self.slides is None else near | ~self.slides)
        if self.segment_ids is not None:
            of_queries = cut(self.segment_ids, first, count)
            mask = mask & same_segment(of_queries, self.segment_ids[:, :seen])
        return mask

    @property
    def grouped(self) -> bool:
        """Whether there is padding or packing to be told by `groups`."""
        return self.valid is not None or self.segment_ids is not None

    def groups(self) -> jax.Array | None:
        """[B, T] int32: tokens see each other where it is equal; padding only sees padding."""
        if self.valid is None:
            ids = self.segment_ids
            return None if ids is None else ids.astype(jnp.int32)
        valid = self.valid.astype(jnp.int32)
        if self.segment_ids is None:
            return valid
        return 2 * self.segment_ids.astype(jnp.int32) + valid


def cut(x: jax.Array, first: int | jax.Array, count: int) -> jax.Array:
    """x[:, first : first + count], where `first` may be traced."""
    if isinstance(first, int):
        return x[:, first : first + count]
    return jax.lax.dynamic_slice_in_dim(x, first, count, axis=1)


def causal_mask(queries: jax.Array, slots: int, valid: jax.Array | None) -> jax.Array:
    """Which slots each query may see: [1 or B, 1, T, S] bool.

    queries [T] is the slot of each query; valid [B, S] is False on padding.
    """
    mask = (jnp.arange(slots)[None, :] <= queries[:, None])[None, None]
    return mask if valid is None else mask & valid[:, None, None, :]


def same_segment(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """[B, 1, T, S] bool: they belong to the same document; segment ids [B, T] and [B, S]."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]
