"""Which examples stand in which row of a run."""

import functools
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from qlora_jax.data.lengths import group_by_length
from qlora_jax.data.order import Parts, epoch_order
from qlora_jax.data.packing import pack


@dataclass(frozen=True)
class Epoch:
    """Row r of an epoch has the examples order[bounds[r]:bounds[r + 1]]; `start` rows precede."""

    order: np.ndarray
    bounds: np.ndarray
    start: int

    def __len__(self) -> int:
        return len(self.bounds) - 1


class Rows:
    """The examples of row n, for rows counted from 0 over all epochs.

    A pure function of the arguments, whichever row is asked for first. Each epoch has its rows in
    an order of its own, packed anew if they are packed.

    parts     (examples, weight) of each dataset that the examples are from
    lengths   tokens of each example
    pack_to   None, or pack several examples into rows of so many tokens
    group     None, or the number of rows in a batch, which are to be of like length
    """

    def __init__(
        self,
        parts: Parts,
        lengths: np.ndarray,
        *,
        seed: int,
        pack_to: int | None = None,
        group: int | None = None,
    ) -> None:
        self._parts, self._lengths, self._seed = parts, lengths, seed
        self._pack_to, self._group = pack_to, group
        self._starts = [0]
        # A batch straddles two epochs, and is asked about while others are made ahead of it.
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)

    def __getitem__(self, row: int) -> list[int]:
        while row >= self._starts[-1]:
            self._begin_next()
        epoch = self._epoch(bisect_right(self._starts, row) - 1)
        first, last = epoch.bounds[row - epoch.start : row - epoch.start + 2]
        return epoch.order[first:last].tolist()

    def count(self, epochs: float) -> float:
        """Rows in so many epochs."""
        whole = int(epochs)
        while len(self._starts) <= whole + 1:
            self._begin_next()
        first, last = self._starts[whole : whole + 2]
        return first + (epochs - whole) * (last - first)

    def _begin_next(self) -> None:
        """Every epoch begins where the last one ends, which packing alone makes hard to tell."""
        last = len(self._starts) - 1
        rows = len(self._lengths) if self._pack_to is None else len(self._epoch(last))
        self._starts.append(self._starts[-1] + rows)

    def _make_epoch(self, number: int) -> Epoch:
        order, start = epoch_order(self._parts, self._seed, number), self._starts[number]
        rng = np.random.default_rng([self._seed, number, 1])
        if self._pack_to is not None:
            order, bounds = pack(order, self._lengths, self._pack_to)
            return _shuffled(order, bounds, start, rng)
        if self._group is not None:
            order = group_by_length(order, self._lengths, self._group, -start % self._group, rng)
        return Epoch(order, np.arange(len(order) + 1), start)


def _shuffled(order: np.ndarray, bounds: np.ndarray, start: int, rng: np.random.Generator) -> Epoch:
    """The rows in random order: packing leaves the fullest of long documents first."""
    rows = rng.permutation(len(bounds) - 1)
    parts = [order[bounds[row] : bounds[row + 1]] for row in rows]
    sizes = np.diff(bounds)[rows]
    return Epoch(np.concatenate(parts), np.concatenate([[0], np.cumsum(sizes)]), start)
