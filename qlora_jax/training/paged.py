"""Optimizer state in host memory, visiting the device a page at a time.

Source: the paged optimizers of QLoRA (arXiv:2305.14314, section 3), which leave it to the driver
what moves and when. Here both are written into the compiled step.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.errors import QloraError
from qlora_jax.training.pages import Layout, Piece, by_path, layout, some

PAGE_BYTES = 2**27
"""128 MiB: far more than copies need to run at full speed, little beside a device's memory."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedState:
    """State of a `paged` optimizer, all of it in pinned host memory.

    shared  the wrapped optimizer's state of no parameter in particular: counts of steps
    pages   its state of each page's parameters, as if they were all there are; None for `shared`
    layout  what each page holds
    """

    shared: Any
    pages: tuple[Any, ...]
    layout: Layout = dataclasses.field(metadata={"static": True})


def paged(
    optimizer: optax.GradientTransformation, page_bytes: int = PAGE_BYTES
) -> optax.GradientTransformation:
    """`optimizer` with its state in pinned host memory; the arithmetic is the same.

    During an update the state visits the device in pages, each of at most `page_bytes` together
    with the updates made from it: the next page arrives while one is updated, and no more than two
    are there at a time. A larger parameter (stacked layers) is cut along its first axis; where the
    optimizer looks at a parameter as a whole (Adafactor), it is a page of its own.

    For any optimizer that treats each parameter apart: AdamW, Lion, Adafactor, their schedules,
    masks, `lora_plus`. `init` raises QloraError for others, such as one that clips by the global
    norm; that goes outside, optax.chain(optax.clip_by_global_norm(1.0), paged(...)).
    """
    if page_bytes < 1:
        raise QloraError(f"page_bytes must be at least 1, got {page_bytes}")

    def init(params: Any) -> PagedState:
        leaves, tree = jax.tree.flatten(params)
        pages = layout(optimizer, params, page_bytes)
        shared = optimizer.init(some(tree, {}))

        def page(pieces: Sequence[Piece]) -> Any:
            held = {piece.parameter: piece.of(leaves[piece.parameter]) for piece in pieces}
            state = _without(optimizer.init(some(tree, held)), shared)
            return jax.tree.map(_to_host, state)

        shared = jax.tree.map(_to_host, settled(shared, params))
        return PagedState(shared, tuple(map(page, pages)), pages)

    def update(updates: Any, state: PagedState, params: Any = None) -> tuple[Any, PagedState]:
        grads, tree = jax.tree.flatten(updates)
        values = None if params is None else tree.flatten_up_to(params)
        shared = jax.tree.map(_to_device, state.shared)

        def step(pieces: Sequence[Piece], inner: Any) -> tuple[list[Any], Any]:
            """The updates of those pieces, and their new state."""

            def held(leaves: Sequence[Any]) -> Any:
                return some(tree, {p.parameter: p.of(leaves[p.parameter]) for p in pieces})

            new, inner = optimizer.update(
                held(grads), inner, None if values is None else held(values)
            )
            leaves = tree.flatten_up_to(new)
            return [leaves[piece.parameter] for piece in pieces], inner

        _, new_shared = step((), shared)
        pages: list[Any] = []
        for pieces, page in zip(state.layout, state.pages, strict=True):
            # Without a reason to wait, all pages would arrive at once. This one waits until the one
            # before the last has left, whose place it takes.
            if len(pages) >= 2:
                page, pages[-2] = jax.lax.optimization_barrier((page, pages[-2]))
            # Counts go through the barrier too: XLA would else divide all pages by one number,
            # multiplying by its reciprocal, which has other bits than dividing one array has.
            page, counts = jax.lax.optimization_barrier((jax.tree.map(_to_device, page), shared))
            new, inner = step(pieces, _with(page, counts))
            new, page = jax.lax.optimization_barrier((new, _without(inner, counts)))
            for piece, part in zip(pieces, new, strict=True):
                grads[piece.parameter] = _put(grads[piece.parameter], part, piece)
            pages.append(jax.tree.map(_to_host, page))
        new_state = PagedState(jax.tree.map(_to_host, new_shared), tuple(pages), state.layout)
        return tree.unflatten(grads), new_state

    return optax.GradientTransformation(init, update)


def host_shardings(state: Any, sharding: jax.sharding.Sharding) -> Any:
    """Where to place a state of which only shapes are known, to compile without a device.

    `sharding` for each of its arrays, in pinned host memory for those of a PagedState.
    """
    host = sharding.with_memory_kind("pinned_host")

    def one(node: Any) -> Any:
        place = host if is_paged(node) else sharding
        return jax.tree.map(lambda _: place, node)

    return jax.tree.map(one, state, is_leaf=is_paged)


def is_paged(node: Any) -> bool:
    """Whether a node of an optimizer's state is that of a `paged` optimizer."""
    return isinstance(node, PagedState)


def settled(tree: Any, beside: Any) -> Any:
    """`tree` with the arrays that nothing binds to a device bound to where they are, or to all of
    the mesh that arrays of `beside` are on.

    What is in host memory is bound; what is not would come back bound from a step that takes both,
    and the next step would be compiled anew. Under a trace there is nothing to do.
    """
    leaves = [x for x in jax.tree.leaves(beside) if not isinstance(x, jax.core.Tracer)]
    shardings = [x.sharding for x in leaves if isinstance(x, jax.Array)]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]

    def one(x: jax.Array) -> jax.Array:
        if isinstance(x, jax.core.Tracer) or x.committed:
            return x
        replicated = NamedSharding(meshes[0], PartitionSpec()) if meshes else x.sharding
        return jax.device_put(x, replicated)

    return jax.tree.map(one, tree)


def _to_host(x: jax.Array) -> jax.Array:
    if isinstance(x, jax.core.Tracer):
        return jax.device_put(x, jax.memory.Space.Host)
    # Outside jit Space.Host would also take the array off its mesh.
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def _to_device(x: jax.Array) -> jax.Array:
    if isinstance(x, jax.core.Tracer):
        return jax.device_put(x, jax.memory.Space.Device)
    return jax.device_put(x, x.sharding.with_memory_kind("device"))


def _put(gradient: jax.Array, update: jax.Array, piece: Piece) -> jax.Array:
    """The update in the place of the gradient, which nobody needs any more."""
    if piece.start is None:
        return update
    if update.dtype != gradient.dtype:
        raise QloraError(
            f"an update of {update.dtype} was made from a gradient of {gradient.dtype}; cast "
            f"gradients to {update.dtype} before they come to a paged optimizer"
        )
    return jax.lax.dynamic_update_slice_in_dim(gradient, update, piece.start, 0)


def _without(state: Any, shared: Any) -> Any:
    """None for what `shared` has."""
    paths = by_path(shared)
    return jax.tree_util.tree_map_with_path(lambda p, x: None if p in paths else x, state)


def _with(state: Any, shared: Any) -> Any:
    """The inverse of `_without`."""
    paths = by_path(shared)
    return jax.tree_util.tree_map_with_path(
        lambda p, x: paths.get(p) if x is None else x, state, is_leaf=lambda x: x is None
    )
