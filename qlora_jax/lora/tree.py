"""Reading parameter trees: their leaves by path, the axes of a weight, random keys by path."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import QloraError
from qlora_jax.lora.array import AdaptedArray, is_weight
from qlora_jax.quant import Policy, QuantizedArray, path_str


def named_leaves(params: Any) -> dict[str, Any]:
    """Path -> leaf, our weights being leaves."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)
    return {path_str(path): leaf for path, leaf in flat}


def split_shape(path: str, leaf: Any, reading: Policy) -> tuple[tuple[int, ...], ...]:
    """(leading axes, contracted axes, output axes) of a weight."""
    if isinstance(leaf, AdaptedArray):
        raise QloraError(f"{path} already has an adapter; start from the tree without it")
    if isinstance(leaf, QuantizedArray):
        return leaf.batch_shape, leaf.k_shape, leaf.n_shape
    k, n = reading.axes_of(path)
    if leaf.ndim < k + n:
        raise QloraError(f"{path}: shape {leaf.shape} has no {k} contracted and {n} output axes")
    shape, lead = tuple(leaf.shape), leaf.ndim - k - n
    return shape[:lead], shape[lead : lead + k], shape[lead + k :]


def key_for(key: jax.Array, path: str) -> jax.Array:
    """A key of the path's own, whatever else is in the tree."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))


def is_abstract(leaf: Any) -> bool:
    """Whether only its shape is known."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf))


def like(leaf: Any) -> jax.Array:
    """A dense leaf in fp32, zeros if it is abstract."""
    if is_abstract(leaf):
        return jnp.zeros(leaf.shape, jnp.float32)
    return jnp.asarray(leaf, jnp.float32)
