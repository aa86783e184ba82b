"""Sharding rules: how each parameter is split over the mesh, by its name.

A rule speaks of the dense weight; what it means for codes, scales, adapters and optimizer state
follows from it.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.lora.adapters import Adapters
from qlora_jax.lora.array import LoraWeights, is_weight
from qlora_jax.lora.vera import VeraProjections, VeraWeights
from qlora_jax.parallel.mesh import FSDP, ROWS, TENSOR
from qlora_jax.quant import QuantizedArray, path_str
from qlora_jax.quant.placement import Names, Placement

Axes = tuple[Names, ...]
"""Mesh axes for each of the last dimensions of a dense weight; those before are not split."""

COLUMNS: Axes = ((FSDP,), (TENSOR,))
"""[K, N] whose outputs are split: its product needs no communication but FSDP's."""
ROWS_OF_WEIGHT: Axes = ((TENSOR,), (FSDP,))
"""[K, N] that takes what such a product gives: partial sums are added over `tensor`."""
TABLE: Axes = ((), (FSDP, TENSOR))
"""Embeddings [V, D]: each device looks up its part of D for all."""
HEAD: Axes = ((), (FSDP, TENSOR))
"""Output head [D, V]: each device has the logits of its part of the vocabulary."""

Rules = Mapping[str, Axes]
"""Pattern of a whole path -> axes; the first that matches counts, what none matches is whole on
every device."""


def _rules(narrowing: str) -> Rules:
    """narrowing: the kernels, by pattern, that follow a product with split outputs."""
    return {
        r"lm_head/kernel": HEAD,
        r"(.*/)?(embed_tokens|shared|word_embeddings)/embedding": TABLE,
        narrowing: ROWS_OF_WEIGHT,
        r"(.*/)?(router|conv|pooler|classifier|score)/.*": (),
        r"(.*/)?kernel": COLUMNS,
    }


_LLAMA = _rules(r".*/(o_proj|down_proj)/kernel")
_BERT = _rules(r".*/output/dense/kernel")
FAMILY_RULES: dict[str, Rules] = {
    "gpt2": _rules(r".*/c_proj/kernel"),
    "t5": _rules(r".*/(o|wo)/kernel"),
    "bert": _BERT,
    "roberta": _BERT,
    "deberta-v2": _BERT,
}
"""model_type -> rules, of the families whose names are not Llama's."""


def rules_for(model_type: str) -> Rules:
    """The rules of a family."""
    return FAMILY_RULES.get(model_type, _LLAMA)


def axes_of(path: str, rules: Rules) -> Axes:
    """What the rules say of the parameter at `path`; (): nothing is split."""
    return next((axes for pattern, axes in rules.items() if re.fullmatch(pattern, path)), ())


def place(params: Any, mesh: Mesh, rules: Rules) -> Any:
    """`params` (arrays or shapes), each QuantizedArray saying how it is split; nothing is moved."""

    def one(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, QuantizedArray):
            return leaf
        axes = axes_of(path_str(path), rules)
        sizes = leaf.scales.shape[-2:]  # K in whole blocks
        k, n = _fit(sizes, axes, mesh, either=True) if axes else ((), ())
        rows = tuple(name for name in ROWS if mesh.shape[name] > 1)
        k, n = (tuple(sorted(names, key=rows.__contains__)) for names in (k, n))
        return dataclasses.replace(leaf, placement=Placement(mesh, k, n, rows))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_weight)


def param_shardings(params: Any, mesh: Mesh, rules: Rules) -> Any:
    """The tree of `place(params, ...)` with a NamedSharding for every leaf.

    Codes and scales of a weight are split alike, K in whole blocks. The nested absmax, a number for
    16384 weights, is whole everywhere.
    """

    def one(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, QuantizedArray):
            assert leaf.placement is not None
            lead = (None,) * len(leaf.batch_shape)
            matrix = NamedSharding(mesh, PartitionSpec(*lead, *leaf.placement.matrix))
            whole = None if leaf.nested is None else NamedSharding(mesh, PartitionSpec())
            return dataclasses.replace(
                leaf, codes=matrix, scales=matrix, nested=whole, offset=whole
            )
        return _sharding(leaf.shape, axes_of(path_str(path), rules), mesh)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_weight)


def adapter_shardings(adapters: Adapters, mesh: Mesh, rules: Rules) -> Adapters:
    """The tree of `adapters` with a NamedSharding for every leaf.

    A is split along K, B along N, over every axis that the weight is split over. A parameter that
    is trained in full is split as the frozen one would be.
    """

    def one(path: str, adapter: Any) -> Any:
        axes = axes_of(path, rules)
        every = tuple(name for names in axes for name in names)
        if isinstance(adapter, LoraWeights):
            k, n = (every, every) if every else ((), ())
            vectors = {
                name: _sharding(leaf.shape, (n,), mesh)
                for name in ("magnitude", "base_norms")
                if (leaf := getattr(adapter, name)) is not None
            }
            return dataclasses.replace(
                adapter,
                a=_sharding(adapter.a.shape, (k, ()), mesh),
                b=_sharding(adapter.b.shape, ((), n), mesh),
                **vectors,
            )
        if isinstance(adapter, VeraWeights | VeraProjections):
            return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), adapter)
        return _sharding(adapter.shape, axes, mesh)

    return {path: one(path, adapter) for path, adapter in adapters.items()}


def like_adapters(tree: Any, adapters: Adapters, shardings: Adapters) -> Any:
    """A NamedSharding for every leaf of `tree`, such as an optimizer's state.

    That of the adapter leaf by whose path its own ends, if the shapes are the same. What stands for
    an adapter leaf, [L, blocks, ...] under its path (as moments of 8 bits do), has its blocks split
    over the same devices. Other leaves are whole everywhere. Parts that are `InHostMemory` are so.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(adapters)
    places = jax.tree.leaves(shardings)
    known = {tuple(path): (leaf.shape, s) for (path, leaf), s in zip(flat, places, strict=True)}
    mesh = places[0].mesh
    whole = NamedSharding(mesh, PartitionSpec())

    def one(path: Any, leaf: Any) -> NamedSharding:
        ends = [tuple(path[start:]) for start in range(len(path))]
        shape, sharding = next((known[end] for end in ends if end in known), (None, whole))
        if shape == leaf.shape:
            return sharding
        under = next((known[end[:-1]] for end in ends if end[:-1] in known), None)
        if under is None or leaf.ndim < 2:
            return whole
        names = tuple(n for axes in under[1].spec if axes for n in _names(axes))
        return _sharding(leaf.shape, ((), names, *((),) * (leaf.ndim - 2)), mesh)

    return in_host_memory(tree, jax.tree_util.tree_map_with_path(one, tree))


class InHostMemory:
    """A node of an optimizer's state whose arrays lie in pinned host memory."""


def in_host_memory(tree: Any, shardings: Any) -> Any:
    """`shardings` of a tree's leaves, in pinned host memory for what is `InHostMemory`."""

    def one(node: Any, shardings: Any) -> Any:
        if not isinstance(node, InHostMemory):
            return shardings
        return jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), shardings)

    return jax.tree.map(one, tree, shardings, is_leaf=lambda node: isinstance(node, InHostMemory))


def _names(axes: Any) -> Names:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _sharding(shape: Sequence[int], axes: Axes, mesh: Mesh) -> NamedSharding:
    """Of an array whose last dimensions are split over `axes`, as far as their sizes allow."""
    axes = axes[-len(shape) :] if shape else ()
    fitting = _fit(shape[len(shape) - len(axes) :], axes, mesh)
    lead = (None,) * (len(shape) - len(axes))
    return NamedSharding(mesh, PartitionSpec(*lead, *(names or None for names in fitting)))


def _fit(sizes: Sequence[int], axes: Axes, mesh: Mesh, *, either: bool = False) -> Axes:
    """For each size its mesh axes, as far as they divide it. either: what does not fit where it is
    wanted may be put to another size."""
    taken: list[Names] = [() for _ in sizes]
    parts = [1] * len(sizes)
    every = tuple(name for names in axes for name in names)
    for wanted in (axes, (every,) * len(sizes)) if either else (axes,):
        for i, size in enumerate(sizes):
            for name in wanted[i]:
                count = mesh.shape[name]
                new = count > 1 and not any(name in names for names in taken)
                if new and size % (parts[i] * count) == 0:
                    taken[i] = (*taken[i], name)
                    parts[i] *= count
    return tuple(taken)
