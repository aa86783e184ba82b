"""Less padding where rows are not packed: examples of like length together, a few lengths of rows.

Every length of rows is a program of its own to compile, so there are three of them at most.
"""

from collections.abc import Sequence

import numpy as np

from qlora_jax.data.tokenize import TokenizedDataset
from qlora_jax.errors import QloraError

MULTIPLE = 16
"""Lengths of rows are multiples of this, as the sides of matrix units' tiles in 16 bits are."""
MOST_BUCKETS = 3
WINDOW = 50
"""Batches that are sorted together: long enough to find like lengths, short enough to stay random
(what transformers' LengthGroupedSampler takes)."""


def check_shapes(packing: bool, group_by_length: bool, buckets: int) -> None:
    """Raises QloraError for what does not go together, and too many buckets."""
    if not 1 <= buckets <= MOST_BUCKETS:
        raise QloraError(f"buckets must be 1 to {MOST_BUCKETS}, got {buckets}")
    if packing and (group_by_length or buckets > 1):
        raise QloraError("packed rows are all full: group_by_length and buckets are for others")


def row_length(dataset: TokenizedDataset, wanted: int | None = None) -> int:
    """T of rows that hold any example: `wanted`, or the longest's length, rounded up.

    It is not rounded beyond the dataset's max_length. Raises QloraError for an empty dataset, and
    if an example is longer than `wanted`.
    """
    if not len(dataset):
        raise QloraError("the dataset has no examples")
    longest = max(map(len, dataset))
    if wanted is None:
        return rounded(longest, dataset.max_length)
    if longest > wanted:
        raise QloraError(
            f"sequence_length is {wanted}, but there is an example of {longest} tokens; "
            f"tokenize with max_length={wanted}"
        )
    return wanted


def choose_buckets(longest_of_batches: Sequence[int], length: int, count: int) -> tuple[int, ...]:
    """At most `count` lengths, the last of them `length`, with the least padding.

    longest_of_batches: tokens of the longest row of each batch, at most `length`. A batch is padded
    to the first length that holds it; the sum of these is what is made least.
    """
    needs = np.minimum(-(-np.asarray(longest_of_batches) // MULTIPLE) * MULTIPLE, length)
    ends, batches = np.unique(np.append(needs, length), return_counts=True)
    before = np.concatenate([[0], np.cumsum(batches)])
    # best[j]: the least sum for batches up to ends[j], with ends[j] a bucket; how: the buckets.
    best = [int(end * before[j + 1]) for j, end in enumerate(ends)]
    how: list[tuple[int, ...]] = [(int(end),) for end in ends]
    for _ in range(count - 1):
        for j in reversed(range(len(ends))):  # best[i] for i < j still is that of one bucket less
            for i in range(j):
                total = best[i] + int(ends[j] * (before[j + 1] - before[i + 1]))
                if total < best[j]:
                    best[j], how[j] = total, (*how[i], int(ends[j]))
    return how[-1]


def group_by_length(
    order: np.ndarray, lengths: np.ndarray, size: int, skip: int, rng: np.random.Generator
) -> np.ndarray:
    """`order` [N] with examples of like length beside each other, in batches of `size`.

    skip: examples that end a batch begun before; they stay, and so do the last ones that fill no
    batch. What is between is sorted by length in windows of 50 batches, and the batches shuffled.
    """
    whole = (len(order) - skip) // size * size
    if whole <= 0:
        return order
    end = skip + whole
    batches = []
    for start in range(skip, end, size * WINDOW):
        window = order[start : min(start + size * WINDOW, end)]
        window = window[np.argsort(-lengths[window], kind="stable")]
        batches.append(window.reshape(-1, size))
    middle = rng.permutation(np.concatenate(batches), axis=0).reshape(-1)
    return np.concatenate([order[:skip], middle, order[end:]])


def rounded(longest: int, limit: int | None = None) -> int:
    """The next multiple of `MULTIPLE`, or `limit` if that is less."""
    up = -(-longest // MULTIPLE) * MULTIPLE
    return up if limit is None else min(up, limit)
