"""Padded or packed batches, in a shuffled order that is a pure function of (seed, step)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from qlora_jax.data.collate import Batch
from qlora_jax.data.lengths import check_shapes, choose_buckets, row_length
from qlora_jax.data.rows import Rows
from qlora_jax.data.tokenize import TokenizedDataset
from qlora_jax.errors import QloraError


class BatchSource:
    """The batch of any step of a run without end: a pure function of (data, arguments, step).

    dataset          one, or several mixed by weight: see `mix`
    batch_size       rows of a batch; a batch may straddle two epochs
    sequence_length  tokens of a row: T, or with `buckets` the largest T; None: the longest
                     example's length, rounded up
    packing          several examples to a row, as many as fit, which do not see each other
    group_by_length  examples of like length in a batch
    buckets          how many lengths of rows there are at most, each a program of its own: a batch
                     gets the shortest that holds it

    Raises QloraError for an empty dataset, an example longer than `sequence_length`, and arguments
    out of range.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        batch_size: int,
        *,
        seed: int,
        sequence_length: int | None = None,
        packing: bool = False,
        group_by_length: bool = False,
        buckets: int = 1,
    ) -> None:
        if batch_size < 1:
            raise QloraError(f"batch_size must be at least 1, got {batch_size}")
        check_shapes(packing, group_by_length, buckets)
        self._dataset, self._size, self._packing = dataset, batch_size, packing
        longest = row_length(dataset, sequence_length)
        self._lengths = np.array([len(example) for example in dataset])
        self.rows = Rows(
            dataset.parts or ((len(dataset), 1.0),),
            self._lengths,
            seed=seed,
            pack_to=longest if packing else None,
            group=batch_size if group_by_length else None,
        )
        self.buckets: tuple[int, ...] = (longest,)
        if buckets > 1:
            first_epoch = range(-(-len(dataset) // batch_size))
            needs = [self._longest(self.rows_of(step)) for step in first_epoch]
            self.buckets = choose_buckets(needs, longest, buckets)

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        return self.part(step, range(self._size))

    def part(self, step: int, wanted: Sequence[int]) -> Batch:
        """Some rows of the batch of `step`, as long as they are in all of it."""
        rows = self.rows_of(step)
        longest = self._longest(rows)
        length = next(bucket for bucket in self.buckets if longest <= bucket)
        examples = [[self._dataset[index] for index in rows[row]] for row in wanted]
        return self._dataset.collate(examples, length, packed=self._packing)

    def tokens_of(self, step: int) -> int:
        """Tokens in all of the batch of `step`, padding not counted."""
        return sum(int(self._lengths[row].sum()) for row in self.rows_of(step))

    def rows_of(self, step: int) -> list[list[int]]:
        """The examples in each row of the batch of `step`, by their numbers in the dataset."""
        return [self.rows[place] for place in range(step * self._size, (step + 1) * self._size)]

    def _longest(self, rows: list[list[int]]) -> int:
        return max(int(self._lengths[row].sum()) for row in rows)


def batches(
    dataset: TokenizedDataset,
    batch_size: int,
    *,
    seed: int,
    sequence_length: int | None = None,
    packing: bool = False,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Batches without end, from step `start_step` on; the other arguments as for `BatchSource`.

    Every epoch has its own order and sees each example exactly once. Step n gives the same batch
    wherever the iteration started, so resuming needs nothing but the step.
    """
    if start_step < 0:
        raise QloraError(f"start_step must not be negative, got {start_step}")
    source = BatchSource(
        dataset, batch_size, seed=seed, sequence_length=sequence_length, packing=packing
    )
    for step in itertools.count(start_step):
        yield source[step]


def evaluation_batches(
    dataset: TokenizedDataset, batch_size: int, *, sequence_length: int
) -> Iterator[Batch]:
    """Each example once, in order, all batches of one shape.

    The last batch is filled with rows that have no labels, or is smaller where none can be without.
    """
    filler = dataset.filler
    for start in range(0, len(dataset), batch_size):
        chosen = list(dataset[start : start + batch_size])
        if filler is not None:
            chosen += [filler] * (batch_size - len(chosen))
        yield dataset.collate([[example] for example in chosen], sequence_length)
