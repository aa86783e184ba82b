"""Optimizer state in host memory, visiting the device a page at a time.

Source: the paged optimizers of QLoRA (arXiv:2305.14314, section 3), which leave it to the driver
what moves and when. Here both are written into the compiled step.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.errors import QloraError
from qlora_jax.parallel.rules import InHostMemory
from qlora_jax.training.divisors import with_divisors
from qlora_jax.training.pages import Layout, Whole, by_path, layout, some

PAGE_BYTES = 2**25
"""32 MiB: enough for copies to run at full speed, little beside a device's memory."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedState(InHostMemory):
    """State of a `paged` optimizer.

    inner   the wrapped optimizer's own, all of it in pinned host memory
    layout  what the pages are
    """

    inner: Any
    layout: Layout = dataclasses.field(metadata={"static": True})


def paged(
    optimizer: optax.GradientTransformation, page_bytes: int = PAGE_BYTES
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` with its state in pinned host memory; updates are the same, to the bit where
    XLA rounds alike (see `with_divisors`).

    During an update the state visits the device in pages, each of at most `page_bytes` (in fp32)
    together with the updates made from it, and no more than two are there at a time. Pages are rows
    of a parameter (some of its stacked layers). Where the optimizer looks at a parameter as a whole
    (Adafactor), it is a page of its own, however large.

    For any optimizer that treats each parameter apart: AdamW, Lion, Adafactor, their schedules,
    masks, `lora_plus`. `init` raises QloraError for others, such as one that clips by the global
    norm; that goes outside, optax.chain(optax.clip_by_global_norm(1.0), paged(...)).

    update takes `finite` too: where it is False, the state stays as it is.
    """
    if page_bytes < 1:
        raise QloraError(f"page_bytes must be at least 1, got {page_bytes}")

    def init(params: Any) -> Any:
        pages = layout(optimizer, params, page_bytes)
        leaves, tree = jax.tree.flatten(params)
        shared = optimizer.init(some(tree, {}))
        # One parameter at a time, so that the device never holds the state of all.
        found: _State = by_path(jax.tree.map(_to_host, settled(shared, params)))
        for number, leaf in enumerate(leaves):
            own = by_path(optimizer.init(some(tree, {number: leaf})))
            found |= {path: _to_host(x) for path, x in own.items() if path not in found}
        whole = jax.eval_shape(optimizer.init, params)
        return PagedState(_filled(whole, found), pages)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        finite: jax.Array | None = None,
        **_: Any,
    ) -> Any:
        grads, tree = jax.tree.flatten(updates)
        values = None if params is None else tree.flatten_up_to(params)
        old = by_path(state.inner)
        shared = by_path(jax.eval_shape(optimizer.init, some(tree, {})))
        shared = {path: _to_device(old[path]) for path in shared}

        def step(
            given: dict[int, Any], own: _State, rows: Any = _all
        ) -> tuple[_Leaves, _State, list[jax.Array]]:
            """Updates from gradients of some parameters, or rows of one, their new state, and the
            numbers that `with_divisors` finds."""
            tree_of = some(tree, given)
            inner = _filled(jax.eval_shape(optimizer.init, tree_of), shared | own)
            held = None
            if values is not None:
                held = some(tree, {number: rows(values[number]) for number in given})
            args = (tree_of, inner, held)
            whose = jax.tree_util.tree_map_with_path(lambda path, _: path in own, inner)
            (new, after), divisors = with_divisors(optimizer.update, args, (True, whose, True))
            if finite is not None:
                after = jax.tree.map(functools.partial(jnp.where, finite), after, inner)
            leaves = tree.flatten_up_to(new)
            return {number: leaves[number] for number in given}, by_path(after), divisors

        new_state: _State = step({}, {})[1]
        zero = jnp.zeros((), jnp.int32)
        for page in state.layout:
            numbers = page.parameters if isinstance(page, Whole) else (page.parameter,)
            given = {number: grads[number] for number in numbers}
            paths = by_path(jax.eval_shape(optimizer.init, some(tree, given))).keys()
            own = {path: old[path] for path in paths if path not in shared}
            if isinstance(page, Whole):
                zero, new, inner = _at_once(step, given, own, zero)
            else:
                zero, new, inner = _in_pages(step, given, own, zero, page.rows)
            for number in numbers:
                grads[number] = new[number]
            new_state |= {path: inner[path] for path in own}
        new_state = {path: _to_host(x) for path, x in new_state.items()}
        return tree.unflatten(grads), PagedState(_filled(state.inner, new_state), state.layout)

    return optax.GradientTransformationExtraArgs(init, update)


_State = dict[Any, jax.Array]
"""Path in the wrapped optimizer's state -> array."""

_Leaves = dict[int, jax.Array]
"""Number of a parameter -> its gradient or update."""


# Each page's loop takes a zero and gives one, so that they run one after the other: XLA might begin
# those of all parameters at once, and have room for all of them.


def _at_once(
    step: Any, given: _Leaves, own: _State, zero: jax.Array
) -> tuple[jax.Array, _Leaves, _State]:
    """`step` for whole parameters, whose state is in host memory."""
    paths = list(own)

    def once(_: Any, carry: Any) -> Any:
        zero, given, own = carry
        page = dict(zip(paths, map(_to_device, own), strict=True))
        new, inner, divisors = step(given, page)
        zero, new, _ = jax.lax.optimization_barrier((zero, new, divisors))
        return zero, new, [_to_host(inner[path]) for path in paths]

    carry = (zero, given, list(own.values()))
    zero, new, state = jax.lax.fori_loop(zero, zero + 1, once, carry)
    return zero, new, dict(zip(paths, state, strict=True))


def _in_pages(
    step: Any, given: _Leaves, own: _State, zero: jax.Array, rows: int
) -> tuple[jax.Array, _Leaves, _State]:
    """`step` for one parameter, whose state is in host memory, so many rows at a time."""
    ((number, gradient),) = given.items()
    count, paths = gradient.shape[0] // rows, list(own)

    def turn(carry: Any, i: jax.Array) -> Any:
        """Page i arrives, page i - 1 is updated and leaves."""
        zero, gradient, state, page = carry
        arriving = [_to_device(_rows(x, jnp.minimum(i, count - 1) * rows, rows)) for x in state]
        start = jnp.maximum(i - 1, 0) * rows
        old = _rows(gradient, start, rows)
        new, inner, divisors = step(
            {number: old}, dict(zip(paths, page, strict=True)), lambda x: _rows(x, start, rows)
        )
        leaving = [inner[path] for path in paths]
        # Nothing is written before the next page is read: else XLA would copy all state, so that
        # the one does not disturb the other.
        zero, update, leaving, arriving, _ = jax.lax.optimization_barrier(
            (zero, new[number], leaving, arriving, divisors)
        )
        if update.dtype != old.dtype:
            raise QloraError(
                f"an update of {update.dtype} was made from a gradient of {old.dtype}; cast "
                f"gradients to {update.dtype} before they come to a paged optimizer"
            )
        # Turn 0 has nothing to update, and what it writes is written again in turn 1. (If the first
        # page arrived before the loop, XLA might fetch those of all parameters at once.)
        update = jnp.where(i > 0, update, old)
        gradient = jax.lax.dynamic_update_slice_in_dim(gradient, update, start, 0)
        state = [
            jax.lax.dynamic_update_slice_in_dim(x, _to_host(y), start, 0)
            for x, y in zip(state, leaving, strict=True)
        ]
        return (zero, gradient, state, arriving), None

    state = list(own.values())
    nothing = [jnp.broadcast_to(zero.astype(x.dtype), (rows, *x.shape[1:])) for x in state]
    carry = (zero, gradient, state, nothing)
    (zero, gradient, state, _), _ = jax.lax.scan(turn, carry, jnp.arange(count + 1))
    return zero, {number: gradient}, dict(zip(paths, state, strict=True))


def _rows(x: jax.Array, start: Any, rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, rows)


def _all(x: jax.Array) -> jax.Array:
    return x


def is_paged(node: Any) -> bool:
    """Whether a node of an optimizer's state is that of a `paged` optimizer."""
    return isinstance(node, PagedState)


def settled(tree: Any, beside: Any) -> Any:
    """`tree` with the arrays that nothing binds to a device bound to where they are, or to all of
    the mesh that arrays of `beside` are on.

    What is in host memory is bound; what is not would come back bound from a step that takes both,
    and the next step would be compiled anew. Under a trace there is nothing to do.
    """
    leaves = [x for x in jax.tree.leaves(beside) if not isinstance(x, Tracer)]
    shardings = [x.sharding for x in leaves if isinstance(x, jax.Array)]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]

    def one(x: jax.Array) -> jax.Array:
        if isinstance(x, Tracer) or x.committed:
            return x
        replicated = NamedSharding(meshes[0], PartitionSpec()) if meshes else x.sharding
        return jax.device_put(x, replicated)

    return jax.tree.map(one, tree)


def _to_host(x: jax.Array) -> jax.Array:
    if isinstance(x, Tracer):
        return jax.device_put(x, jax.memory.Space.Host)
    # Outside jit Space.Host would also take the array off its mesh.
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def _to_device(x: jax.Array) -> jax.Array:
    if isinstance(x, Tracer):
        return jax.device_put(x, jax.memory.Space.Device)
    return jax.device_put(x, x.sharding.with_memory_kind("device"))


def _filled(tree: Any, leaves: _State) -> Any:
    """`tree` with the leaves at those paths."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path], tree)
