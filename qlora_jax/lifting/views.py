"""Operations that change how a weight is seen or differentiated: none touches its numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from qlora_jax.lifting.lazy import Lazy
from qlora_jax.lora.array import map_stacked


def _same(eqn: JaxprEqn, w: Lazy) -> Lazy | None:
    return w


def _stop_gradient(eqn: JaxprEqn, w: Lazy) -> Lazy | None:
    # Of every leaf, so that A and B get no gradient by this use; codes and keys have none anyway.
    return dataclasses.replace(w, array=jax.lax.stop_gradient(w.array))


def _convert(eqn: JaxprEqn, w: Lazy) -> Lazy | None:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return Lazy(w.array, w.view, jnp.dtype(dtype), w.path)


def _transpose(eqn: JaxprEqn, w: Lazy) -> Lazy | None:
    return w.seen_as(w.view.transpose(eqn.params["permutation"]))


def _reshape(eqn: JaxprEqn, w: Lazy) -> Lazy | None:
    if eqn.params["dimensions"] is not None:
        return None
    view = w.view.reshape(eqn.params["new_sizes"])
    return None if view is None else w.seen_as(view)


def _broadcast(eqn: JaxprEqn, w: Lazy) -> Lazy | None:
    """Only where it adds dimensions of size 1."""
    shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    view = w.view.with_unit_dims(len(shape), kept)
    return w.seen_as(view) if view.shape == tuple(shape) else None


def _squeeze(eqn: JaxprEqn, w: Lazy) -> Lazy | None:
    for place in sorted(eqn.params["dimensions"], reverse=True):
        stacked = w.batch_axis(place) is not None
        w = w.one_of_stack(place, 0) if stacked else w.seen_as(w.view.drop(place))
    return w


def _slice(eqn: JaxprEqn, w: Lazy) -> Lazy | None:
    """Static slices of stacked axes."""
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    for place, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        if (start, limit, stride) == (0, w.shape[place], 1):
            continue
        axis = w.batch_axis(place)
        if axis is None:
            return None
        w = _cut_stack(w, place, range(start, limit, stride), axis)
    return w


def _dynamic_slice(eqn: JaxprEqn, w: Lazy, *starts: Any) -> Lazy | None:
    """Slices of stacked axes at indices known at run time: one layer out of many."""
    for place, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        if size == w.shape[place]:
            continue
        axis = w.batch_axis(place)
        if axis is None or isinstance(start, Lazy):
            return None

        def cut(leaf: Any, start: Any = start, size: int = size, axis: int = axis) -> Any:
            return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis)

        w = _resized(w, place, size, map_stacked(cut, w.array))
    return w


def _cut_stack(w: Lazy, place: int, chosen: range, axis: int) -> Lazy:
    cut = (slice(None),) * axis + (slice(chosen.start, chosen.stop, chosen.step),)
    return _resized(w, place, len(chosen), map_stacked(lambda leaf: leaf[cut], w.array))


def _resized(w: Lazy, place: int, size: int, array: Any) -> Lazy:
    return Lazy(array, w.view.resized(place, size), w.dtype, w.path)


RULES: dict[str, Callable[..., Lazy | None]] = {
    "convert_element_type": _convert,
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "copy": _same,
    "copy_p": _same,
    "stop_gradient": _stop_gradient,
    "name": _same,
    "pvary": _same,
    "pcast": _same,
    # Placement of a dense weight that will not exist; the leaves carry their own shardings.
    "sharding_constraint": _same,
    "reshard": _same,
}
"""Primitive's name -> rule(equation, weight, other inputs...); None: the rule does not hold."""
