"""Stacks of layers, and the scan over them: one stack, or several that take turns.

A stack is layers of one kind with their parameters stacked as [layers, ...]. Layers of several
kinds in one model (experts in every other layer, say) are as many stacks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

Step = Callable[[Any, Any], tuple[Any, Any]]
"""As `jax.lax.scan` takes it: step(carry, (a layer's state, its entry of xs)) -> carry, output."""


def stack(make_layer: Callable[[nnx.Rngs], Any], layers: int, rngs: nnx.Rngs) -> Any:
    """A module that is `layers` layers, each leaf of its state [layers, ...]."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> Any:
        return make_layer(rngs)

    return make(rngs)


def scan_layers(
    steps: Mapping[str, Step],
    carry: Any,
    states: Mapping[str, Any],
    numbers: Mapping[str, Sequence[int]],
    xs: Any,
) -> tuple[Any, list[Any]]:
    """The carry after all layers, and their outputs.

    steps    of the layers of each stack
    states   of each stack, leaves [its layers, ...]
    numbers  of each stack: which of the model's layers it holds, in order
    xs       a pytree of arrays [all layers, ...]

    Layers that repeat in a pattern are scanned pattern by pattern, so that the program grows with
    the pattern and not with the number of layers. The outputs are a list of pytrees whose leaves
    [n, ...] are those of n layers of one kind; it is not in the order of the layers.

    A stack that is in one pattern, once, is scanned as it is; in other cases it is cut for the
    scan, and XLA may copy the parts.
    """
    places = sorted((number, name) for name, of in numbers.items() for number in of)
    order = [name for _, name in places]
    outputs, begin = [], 0
    for unit, times in patterns(order):
        end, parts = begin + len(unit) * times, []
        for place, name in enumerate(unit, start=begin):
            state = slice(order[:place].count(name), order[:end].count(name), unit.count(name))
            parts.append((_cut(states[name], state), _cut(xs, slice(place, end, len(unit)))))

        def turn(carry: Any, parts: list[Any], unit: Sequence[str] = unit) -> tuple[Any, list[Any]]:
            outputs = []
            for name, part in zip(unit, parts, strict=True):
                carry, output = steps[name](carry, part)
                outputs.append(output)
            return carry, outputs

        carry, new = jax.lax.scan(turn, carry, parts)
        outputs += new
        begin = end
    return carry, outputs


def patterns(order: Sequence[str]) -> Iterator[tuple[Sequence[str], int]]:
    """`order` as (pattern, how many times it comes), one after another.

    At each place the pattern is taken that reaches farthest by repeating, the shortest of several;
    where nothing repeats, a single layer.
    """
    while order:
        unit, times = 1, 1
        for size in range(1, len(order) // 2 + 1):
            turns = 1
            while order[turns * size : (turns + 1) * size] == order[:size]:
                turns += 1
            if turns > 1 and turns * size > unit * times:
                unit, times = size, turns
            if unit * times == len(order):
                break
        yield order[:unit], times
        order = order[unit * times :]


def _cut(tree: Any, part: slice) -> Any:
    """These entries of the leading axis."""
    return jax.tree.map(lambda leaf: leaf[part], tree)
