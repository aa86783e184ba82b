"""For training loops of one's own: which leaves of a tree with adapters are trained.

Two ways. Cut the tree, and differentiate one half:

    trainable, frozen = partition(tree, trainable_mask(tree))
    grads = jax.grad(lambda t: loss(combine(t, frozen)))(trainable)

or keep one tree and wrap the optimizer, `freeze_base(optimizer)`; it then needs gradients for the
whole tree: jax.grad(loss, allow_int=True), 4-bit codes being integers.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlora_jax.errors import QloraError
from qlora_jax.lora.array import AdaptedArray, is_weight, trained_fields
from qlora_jax.quant import path_str


def trainable_mask(tree: Any, also: Iterable[str] = ()) -> Any:
    """A tree of booleans: True on A and B of every LoraArray (of others what is trained in their
    stead), and on parameters at paths `also`.

    also: what is trained in full, such as "lm_head/kernel". Raises KeyError for a missing path.
    """
    full = set(also)

    def one(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, AdaptedArray):
            return trained_fields(leaf)
        name = path_str(path)
        chosen = name in full
        full.discard(name)
        return jax.tree.map(lambda _: chosen, leaf)

    mask = jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_weight)
    if full:
        raise KeyError(f"no such parameters: {sorted(full)}")
    return mask


def partition(tree: Any, mask: Any) -> tuple[Any, Any]:
    """(trainable, frozen): the tree twice, each with None where the other has its leaves."""
    trainable = jax.tree.map(lambda m, x: x if m else None, mask, tree)
    frozen = jax.tree.map(lambda m, x: None if m else x, mask, tree)
    return trainable, frozen


def combine(trainable: Any, frozen: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None
    )


def freeze_base(
    optimizer: optax.GradientTransformation, also: Iterable[str] = ()
) -> optax.GradientTransformation:
    """`optimizer` on the trainable leaves of a whole tree, nothing at all on the rest.

    The optimizer keeps no state for frozen leaves, and their updates are zero (optax.masked alone
    would hand their gradients through as updates). Raises QloraError, when it updates, for a tree
    with dropout, which needs a new key at each step.
    """
    also = tuple(also)
    return optax.chain(
        optax.masked(optimizer, lambda tree: trainable_mask(tree, also)),
        optax.masked(
            _no_updates(), lambda tree: jax.tree.map(lambda m: not m, trainable_mask(tree, also))
        ),
    )


def _no_updates() -> optax.GradientTransformation:
    """Zero updates of the parameters' own dtypes, so that integer leaves can be added to."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError("freeze_base: call update with params")
        if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(params)):
            raise QloraError(
                "freeze_base: the tree holds the key of a dropout, which no update can be added "
                "to; attach without dropout, or cut the tree (partition) and attach anew each step"
            )
        return jax.tree.map(jnp.zeros_like, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
