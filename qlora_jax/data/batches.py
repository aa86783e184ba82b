"""Padded batches in a shuffled order that is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypedDict

import numpy as np

from qlora_jax.data.tokenize import IGNORE, TokenizedDataset, TokenizedExample
from qlora_jax.errors import QloraError


class Batch(TypedDict):
    """int32 arrays [B, T]; labels are not shifted, attention_mask is 1 on tokens, 0 on padding."""

    input_ids: np.ndarray
    labels: np.ndarray
    attention_mask: np.ndarray


def collate(examples: Sequence[TokenizedExample], length: int, pad_id: int) -> Batch:
    """Right-pads examples to [B, length]. Raises QloraError if one is longer."""
    shape = (len(examples), length)
    input_ids = np.full(shape, pad_id, np.int32)
    labels = np.full(shape, IGNORE, np.int32)
    attention_mask = np.zeros(shape, np.int32)
    for row, example in enumerate(examples):
        size = len(example)
        if size > length:
            raise QloraError(f"an example of {size} tokens does not fit sequence length {length}")
        input_ids[row, :size] = example.input_ids
        labels[row, :size] = example.labels
        attention_mask[row, :size] = 1
    return Batch(input_ids=input_ids, labels=labels, attention_mask=attention_mask)


def batches(
    dataset: TokenizedDataset,
    batch_size: int,
    *,
    seed: int,
    sequence_length: int,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Batches without end, from step `start_step` on.

    Every epoch has its own order and sees each example exactly once; a batch may straddle two
    epochs. Step n gives the same batch wherever the iteration started, so resuming needs nothing
    but the step. Raises QloraError, at the first batch, for an empty dataset or a bad argument.
    """
    if batch_size < 1 or start_step < 0:
        raise QloraError(f"need batch_size >= 1, start_step >= 0; got {batch_size}, {start_step}")
    count = len(dataset)
    if not count:
        raise QloraError("the dataset has no examples")

    @lru_cache(maxsize=2)  # a batch straddles two epochs at a time; more only if it is larger
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(count)

    step = start_step
    while True:
        places = range(step * batch_size, (step + 1) * batch_size)
        chosen = [dataset[int(order(place // count)[place % count])] for place in places]
        yield collate(chosen, sequence_length, dataset.pad_id)
        step += 1


def evaluation_batches(
    dataset: TokenizedDataset, batch_size: int, *, sequence_length: int
) -> Iterator[Batch]:
    """Each example once, in order, all batches of one shape.

    The last batch is filled with rows that have no labels; their first position stays attended, so
    that no row of the attention is empty.
    """
    filler = TokenizedExample(np.full(1, dataset.pad_id, np.int32), np.full(1, IGNORE, np.int32))
    for start in range(0, len(dataset), batch_size):
        chosen = list(dataset[start : start + batch_size])
        chosen += [filler] * (batch_size - len(chosen))
        yield collate(chosen, sequence_length, dataset.pad_id)
