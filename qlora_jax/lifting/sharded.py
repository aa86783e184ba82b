"""Weights into shard_map: each shard gets its part of the codes, the scales, and of A and B."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec

from qlora_jax.lifting.control import Walker
from qlora_jax.lifting.lazy import Lazy
from qlora_jax.lifting.view import Atom, View
from qlora_jax.lora.array import AdaptedArray, LoraArray, together
from qlora_jax.lora.vera import VeraArray
from qlora_jax.quant import QuantizedArray


def shard_map(eqn: JaxprEqn, inputs: list[Any], walker: Walker) -> list[Any]:
    """jax.shard_map; a weight that cannot be cut as its dense form would be is made dense."""
    params = eqn.params
    sizes = dict(params["mesh"].shape)
    cuts = [
        _cut(x, spec, sizes) if isinstance(x, Lazy) else None
        for x, spec in zip(inputs, params["in_specs"], strict=True)
    ]
    inputs = [
        walker.dense(x, "shard_map") if isinstance(x, Lazy) and cut is None else x
        for x, cut in zip(inputs, cuts, strict=True)
    ]
    arrays = [x if cut is None else cut.array for x, cut in zip(inputs, cuts, strict=True)]
    specs = [
        spec if cut is None else cut.specs
        for spec, cut in zip(params["in_specs"], cuts, strict=True)
    ]

    def body(*arrays: Any) -> tuple[Any, ...]:
        local = [
            array if cut is None else cut.inside(array)
            for array, cut in zip(arrays, cuts, strict=True)
        ]
        outputs = walker.walk(params["jaxpr"], (), local)
        return tuple(walker.dense(out, "shard_map") for out in outputs)

    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=tuple(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return list(mapped(*arrays))


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A weight ready for shard_map. array: whole leaves; specs: one for each of them."""

    array: Any
    specs: Any
    view: View
    dtype: Any
    path: str
    k_shape: tuple[int, ...]
    n_shape: tuple[int, ...]

    def inside(self, array: Any) -> Lazy:
        """The part of one shard, which knows the part's shape."""
        return Lazy(self._local(array), self.view, self.dtype, self.path)

    def _local(self, array: Any) -> Any:
        if isinstance(array, QuantizedArray):
            return dataclasses.replace(
                array, k_shape=self.k_shape, n_shape=self.n_shape, placement=None
            )
        if isinstance(array, AdaptedArray) and isinstance(array.base, QuantizedArray):
            return together(array, {"base": self._local(array.base)})
        return array


Names = tuple[str, ...]


def _cut(w: Lazy, spec: PartitionSpec, mesh: dict[str, int]) -> _Cut | None:
    """How to cut a weight as `spec` cuts the array that it stands for; None if it cannot be.

    Every contracted axis but the first must stay whole, and a shard must hold whole blocks.
    """
    k_shape, n_shape = w.array.k_shape, w.array.n_shape
    batch = len(w.array.batch_shape)
    starts = {"k": batch, "n": batch + len(k_shape)}
    axis_names: dict[int, Names] = {}
    dims = list(w.view.dims)
    for place, entry in enumerate(spec):
        names: Names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        parts = math.prod(mesh[name] for name in names)
        if parts == 1:
            continue
        dim = dims[place]
        if not dim or any(dim[0].order[1:]) or dim[0].size % parts:
            return None
        first = dim[0]
        axis = w.batch_axis(place)
        axis_names[starts[first.kind] + first.order[0] if axis is None else axis] = names
        dims[place] = (Atom(first.order, first.kind, first.size // parts), *dim[1:])

    def local(sizes: Sequence[int], start: int) -> tuple[int, ...]:
        parts = [
            math.prod(mesh[n] for n in axis_names.get(start + i, ())) for i in range(len(sizes))
        ]
        return tuple(size // part for size, part in zip(sizes, parts, strict=True))

    n_start = batch + len(k_shape)
    quantized = w.array.base if isinstance(w.array, AdaptedArray) else w.array
    if isinstance(quantized, QuantizedArray) or isinstance(w.array, VeraArray):
        # Codes and scales, and VeRA's A and B, have K and N flattened: only their slowest axis can
        # be cut.
        inner = {*range(batch + 1, n_start), *range(n_start + 1, n_start + len(n_shape))}
        if inner & set(axis_names):
            return None
    if (
        isinstance(quantized, QuantizedArray)
        and batch in axis_names
        and math.prod(local(k_shape, batch)) % quantized.block_size
    ):
        return None

    lead = [axis_names.get(i) for i in range(batch)]
    k_axes = [axis_names.get(batch + i) for i in range(len(k_shape))]
    n_axes = [axis_names.get(n_start + i) for i in range(len(n_shape))]
    array = w.array
    base, base_specs = quantized, PartitionSpec(*lead, *k_axes, *n_axes)
    if isinstance(quantized, QuantizedArray):
        # 256 scales share a nested absmax, across columns: they are resolved before the cut.
        base = dataclasses.replace(quantized, scales=quantized.absmax(), nested=None, offset=None)
        matrix = PartitionSpec(*lead, k_axes[0], n_axes[0])
        base_specs = dataclasses.replace(base, codes=matrix, scales=matrix)
    specs = base_specs
    if isinstance(array, AdaptedArray):
        keys = None if array.dropout_key is None else PartitionSpec(*lead)
        specs = together(array, {"base": base_specs, "dropout_key": keys})
        if isinstance(array, VeraArray):
            specs = dataclasses.replace(
                specs,
                a=PartitionSpec(*k_axes[:1], None),
                b=PartitionSpec(None, *n_axes[:1]),
                lambda_d=PartitionSpec(*lead, None),
                lambda_b=PartitionSpec(*lead, *n_axes),
            )
        else:
            assert isinstance(array, LoraArray)
            specs = dataclasses.replace(
                specs,
                a=PartitionSpec(*lead, *k_axes, None),
                b=PartitionSpec(*lead, None, *n_axes),
                scaling=PartitionSpec(*lead),
                gain=None if array.gain is None else PartitionSpec(*lead, *n_axes),
            )
        array = together(array, {"base": base})
    else:
        array = base
    return _Cut(
        array,
        specs,
        View(tuple(dims)),
        w.dtype,
        w.path,
        local(k_shape, batch),
        local(n_shape, n_start),
    )
