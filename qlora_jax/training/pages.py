"""Which parameters share a page of a paged optimizer, and whether they may be cut."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from qlora_jax.errors import QloraError
from qlora_jax.quant import path_str
from qlora_jax.training.dependence import Dependence, Rows, dependences, draws_numbers


class Whole(NamedTuple):
    """A page of whole parameters, by their numbers among the tree's leaves."""

    parameters: tuple[int, ...]


class Cut(NamedTuple):
    """A parameter in pages of so many rows each."""

    parameter: int
    rows: int


Layout = tuple[Whole | Cut, ...]


def some(tree: Any, leaves: Mapping[int, Any]) -> Any:
    """A tree of that structure with those leaves (by number) and None for the others."""
    return tree.unflatten([leaves.get(i) for i in range(tree.num_leaves)])


def by_path(tree: Any) -> dict[Any, Any]:
    """Path -> leaf."""
    return dict(jax.tree_util.tree_flatten_with_path(tree)[0])


def layout(optimizer: optax.GradientTransformation, params: Any, page_bytes: int) -> Layout:
    """One page of small parameters, then the others: in pages of some rows, or whole.

    What counts is state and update, four bytes a number: what is stored in less is fp32 while it
    is worked on. Pages of a parameter are equal, so that one loop does them all; there are at least
    two, since XLA unrolls a loop of one, and what is unrolled it may do all at once. Raises
    QloraError if the optimizer does not treat parameters apart.
    """
    found = _parameters(optimizer, params)
    room, together = page_bytes, []
    for number in sorted(range(len(found)), key=lambda i: found[i].size):
        room -= found[number].size
        if room < 0:
            break
        together.append(number)
    pages: list[Whole | Cut] = [Whole(tuple(sorted(together)))] if together else []
    for number, (size, rows) in enumerate(found):
        if number in together:
            continue
        if rows is None or rows < 2:
            pages.append(Whole((number,)))
            continue
        fits = min(page_bytes * rows // size, rows // 2)
        divisors = [n for n in range(1, max(fits, 1) + 1) if rows % n == 0]
        pages.append(Cut(number, divisors[-1]))
    return tuple(pages)


class _Parameter(NamedTuple):
    """Bytes of its state and updates in fp32; its rows, if it may be cut between them."""

    size: int
    rows: int | None


def _parameters(optimizer: optax.GradientTransformation, params: Any) -> list[_Parameter]:
    named, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [path_str(path) for path, _ in named]
    leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in named]
    numbers = list(range(len(leaves)))
    whole = tree.unflatten(leaves)
    init, state = jax.make_jaxpr(optimizer.init, return_shape=True)(whole)
    step = jax.make_jaxpr(optimizer.update)(whole, state, whole)

    if draws_numbers(step.jaxpr):
        raise QloraError(
            "paged updates a few parameters at a time, and this optimizer would draw the same "
            "random numbers for each of them. Put what draws them outside: "
            "optax.chain(optax.add_noise(0.1, 0.5, seed), paged(optax.sgd(0.1, 0.9)))"
        )
    starts = [_input(number, leaf, leaf) for number, leaf in enumerate(leaves)]
    unowned = [Dependence() for _ in jax.tree.leaves(state)]
    new = dependences(step.jaxpr, [*starts, *unowned, *starts])
    _check_apart(zip(numbers, new, strict=False), names)

    owners = _owners(optimizer, tree, leaves, names)
    arrays = list(by_path(state).items())
    labels = [owners.get(path) for path, _ in arrays]
    states = [
        _input(label, x, None if label is None else leaves[label])
        for label, (_, x) in zip(labels, arrays, strict=True)
    ]
    made = dependences(init.jaxpr, starts)
    new = dependences(step.jaxpr, [*starts, *states, *starts])
    _check_apart(zip([*numbers, *labels], new, strict=True), names)

    sizes = [4 * math.prod(leaf.shape) for leaf in leaves]
    cut = [len(leaf.shape) > 0 for leaf in leaves]
    for label, (_, x) in zip(labels, arrays, strict=True):
        if label is not None:
            sizes[label] += 4 * math.prod(x.shape)
    for label, found, aval in [
        *zip(labels, made, init.out_avals, strict=True),
        *zip([*numbers, *labels], new, step.out_avals, strict=True),
    ]:
        if label is not None:
            same_rows = aval.shape[:1] == leaves[label].shape[:1]
            cut[label] &= same_rows and found.rows is not Rows.MIXED
    return [
        _Parameter(size, leaf.shape[0] if may else None)
        for size, leaf, may in zip(sizes, leaves, cut, strict=True)
    ]


def _owners(optimizer: Any, tree: Any, leaves: Sequence[Any], names: Sequence[str]) -> dict:
    """Path in the state -> whose it is, for what is not of no parameter in particular."""
    shared = by_path(jax.eval_shape(optimizer.init, some(tree, {})))
    owners: dict[Any, int] = {}
    for number, leaf in enumerate(leaves):
        own = by_path(jax.eval_shape(optimizer.init, some(tree, {number: leaf})))
        for path in own.keys() - shared.keys():
            if path in owners:
                raise QloraError(
                    "paged keeps the state of each parameter apart, but this optimizer's "
                    f"state{jax.tree_util.keystr(path)} belongs to {names[owners[path]]} and to "
                    f"{names[number]}"
                )
            owners[path] = number
    return owners


def _input(label: int | None, x: Any, parameter: Any) -> Dependence:
    """Of an input that belongs to a parameter, or to none."""
    if label is None:
        return Dependence(rows=Rows.MIXED if x.shape else Rows.SAME)
    own = len(x.shape) > 0 and x.shape[:1] == parameter.shape[:1]
    return Dependence(frozenset({label}), Rows.OWN if own else Rows.MIXED)


def _check_apart(outputs: Any, names: Sequence[str]) -> None:
    """Refuses an output of one parameter, or of none, that depends on another parameter."""
    for label, found in outputs:
        others = found.sources - {label}
        if others:
            whose = "a number of no parameter" if label is None else f"the update of {names[label]}"
            raise QloraError(
                "paged updates a few parameters at a time, but in this optimizer "
                f"{whose} depends on the gradient or value of {names[min(others)]}. Put what looks "
                "at all of them outside: "
                "optax.chain(optax.clip_by_global_norm(1.0), paged(optax.adamw(2e-4)))"
            )
