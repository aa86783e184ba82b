"""DoRA (arXiv:2402.09353): the length of each column of W + scaling * A B is a parameter.

W' = magnitude * (W + scaling * A B) / ||W + scaling * A B||, norms being taken over the contracted
axes. As the paper suggests, they are constants to the gradient. No dense weight is formed for them:

    ||W + s A B||^2 = ||W||^2 + s * (sum over r of B * (2 A^T W + s A^T A B))

where ||W|| never changes, so that a step costs one product of R rows with the 4-bit weight.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.errors import QloraError
from qlora_jax.lora.array import LoraArray, LoraWeights, dense_base, is_weight, lengths
from qlora_jax.quant import QuantizedArray, nf4_matmul


def with_magnitude(weights: LoraWeights, base: Any) -> LoraWeights:
    """The adapter of `base` under DoRA, with the magnitudes that change nothing."""
    array = with_norms_of(weights, base).on(base)
    return dataclasses.replace(weights, magnitude=norms(array), base_norms=array.base_norms)


def with_norms_of(weights: LoraWeights, base: Any) -> LoraWeights:
    """The adapter, knowing the norms of `base`."""
    return dataclasses.replace(weights, base_norms=_base_norms(weights.on(base)))


def settle(params: Any) -> Any:
    """`params` with the norms of all weights under DoRA taken: a gain stands for them.

    `lift` does it at every call; for many calls with the same adapters it need be done but once.
    """

    def one(w: Any) -> Any:
        if not isinstance(w, LoraArray) or w.magnitude is None:
            return w
        gain = w.magnitude / norms(w)
        return dataclasses.replace(w, gain=gain, magnitude=None, base_norms=None)

    return jax.tree.map(one, params, is_leaf=is_weight)


def norms(w: LoraArray) -> jax.Array:
    """||W + scaling * A B||, fp32 [..., *N axes], without a gradient."""
    return jax.lax.stop_gradient(_each(_norms, w))


def base_of(merged: jax.Array, weights: LoraWeights) -> jax.Array:
    """W, fp32, of a merged weight: the inverse of merging `weights` into the W that they know.

    A column of the merged weight has lost its norm t before scaling; W = t u - s A B, u being the
    column at length one, has the known ||W|| for one positive t only if ||s A B|| <= ||W||.
    Raises QloraError where that does not hold, or where the magnitude is zero.
    """
    array = weights.on(merged.astype(jnp.float32))
    batch = len(array.batch_shape)
    k_axes = tuple(range(batch, batch + array.k_ndim))
    plain = dataclasses.replace(array, base=jnp.zeros_like(array.base), magnitude=None)
    low_rank = plain.dequantize()
    unit = array.base / jnp.expand_dims(weights.magnitude, k_axes)
    along = jnp.sum(unit * low_rank, k_axes)
    rest = jnp.square(weights.base_norms) - jnp.square(low_rank).sum(k_axes)
    if bool(jnp.any((rest < 0) | (weights.magnitude == 0))):
        raise QloraError(
            "some columns of a DoRA adapter are larger than the weight's own, or have the "
            "magnitude zero: the merged weight does not say what it was; keep the base instead"
        )
    length = along + jnp.sqrt(jnp.square(along) + rest)
    return jnp.expand_dims(length, k_axes) * unit - low_rank


@jax.jit
def _base_norms(w: LoraArray) -> jax.Array:
    def one(w: LoraArray) -> jax.Array:
        return lengths(jnp.square(dense_base(w.base, jnp.float32)).sum(tuple(range(w.k_ndim))))

    return _each(one, w)


def _norms(w: LoraArray) -> jax.Array:
    """Of one weight."""
    a, b = w.factors()
    # In the weight's dtype, as in the products that this is the norm of.
    rows = a.T.astype(w.dtype)
    if isinstance(w.base, QuantizedArray):
        crossed = nf4_matmul(rows, w.base, out_dtype=jnp.float32)
    else:
        base = w.base.reshape(a.shape[0], -1)
        crossed = jnp.dot(rows, base, preferred_element_type=jnp.float32)
    own = jnp.dot(jnp.dot(a.T, a, precision="highest"), b, precision="highest")
    change = w.scaling * (b * (2.0 * crossed + w.scaling * own)).sum(0)
    return lengths(jnp.square(w.base_norms) + change.reshape(w.n_shape))


def _each(one: Callable[[Any], jax.Array], w: LoraArray) -> jax.Array:
    """`one` of every stacked weight, one after the other: not all are decoded at a time."""
    for _ in w.batch_shape:
        one = functools.partial(jax.lax.map, one)
    return one(w)
