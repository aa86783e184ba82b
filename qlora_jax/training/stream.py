"""The batches of a run, step by step, made ahead of the steps that take them."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qlora_jax.data import Batch, BatchSource, TokenizedDataset
from qlora_jax.errors import missing
from qlora_jax.training.settings import TrainSettings

AHEAD = 8
"""Batches that are ready before they are asked for."""


class StepBatches:
    """What each step of a run trains on: a pure function of the data, the settings and the step.

    rows: those to make of each micro-batch, by default all. steps: how many the run takes. waited:
    seconds that the step's batch was waited for, which is all the time that input costs. Raises
    QloraError as `BatchSource`.
    """

    def __init__(
        self,
        train: TokenizedDataset,
        settings: TrainSettings,
        rows: Sequence[int] | None = None,
    ) -> None:
        try:
            import grain
        except ModuleNotFoundError as error:
            raise missing("grain", "making batches ahead", "cli") from error
        self._grain, self._train = grain, train
        size, accumulate = settings.batch_size, settings.accumulate
        rows = range(size) if rows is None else rows
        self._wanted = [micro * size + row for micro in range(accumulate) for row in rows]
        self._micro = (accumulate, len(rows))
        self._source = BatchSource(
            train,
            settings.batch_size * settings.accumulate,
            seed=settings.seed,
            sequence_length=settings.sequence_length,
            packing=settings.packing,
            group_by_length=settings.group_by_length,
            buckets=settings.most_buckets,
        )
        epochs = 1.0 if settings.epochs is None else settings.epochs
        self.steps = settings.steps or settings.steps_for(self._source.rows.count(epochs) / epochs)
        self.waited = 0.0

    @property
    def buckets(self) -> tuple[int, ...]:
        """The lengths T of rows: as many programs are compiled."""
        return self._source.buckets

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        """The batch of step `index`: leaves [B, T] or, accumulating, [accumulate, B, T]."""
        batch: Any = {}
        for name, array in self._source.part(index, self._wanted).items():
            array = np.asarray(array)
            array = array.reshape(*self._micro, *array.shape[1:])
            batch[name] = array[0] if self._micro[0] == 1 else array
        return batch

    def largest(self) -> Batch:
        """A batch of the longest rows that the run has."""
        found = self[0]
        for step in range(1, self.steps):
            if found["input_ids"].shape[-1] == self.buckets[-1]:
                break
            found = max(found, self[step], key=lambda batch: batch["input_ids"].shape[-1])
        return found

    def tokens_of(self, step: int) -> int:
        """Tokens that step `step`, counted from 0, trains on in all rows; padding is none."""
        return self._source.tokens_of(step)

    def examples_of(self, step: int) -> list[str]:
        """The examples of step `step`, all counted from 0, and where they are from, if known."""
        numbers = sorted(number for row in self._source.rows_of(step) for number in row)
        places = [self._train[number].where for number in numbers]
        return [
            f"example {number} ({place})" if place else f"example {number}"
            for number, place in zip(numbers, places, strict=True)
        ]

    def start(self, step: int = 0) -> Iterator[Batch]:
        """Batches from `step` on, counted from 0, to the end of the run.

        Step n gives the same batch wherever the iteration started, so that resuming needs nothing
        but the step. They are made by a thread beside this one.
        """
        if step >= self.steps:
            return
        # One thread: the source keeps the order of the epoch that it is in.
        options = self._grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        batches = iter(self._grain.MapDataset.source(self)[step:].to_iter_dataset(options))
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited = time.perf_counter() - began
            if batch is None:
                return
            yield batch
