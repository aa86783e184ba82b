"""The order of examples in an epoch: a permutation, or draws from several datasets by weight."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qlora_jax.data.tokenize import TokenizedDataset
from qlora_jax.errors import QloraError

Parts = Sequence[tuple[int, float]]
"""(examples, weight) of each dataset of a mixture, in the order in which they are joined."""


def shares(parts: Parts) -> list[int]:
    """How many examples of each part an epoch has; together as many as the parts have.

    Largest remainders, so that the shares are the weights' to within one example. Raises QloraError
    for a weight that is not positive, or so small that its part would have no example.
    """
    weights = np.array([weight for _, weight in parts], np.float64)
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise QloraError(f"weights of datasets must be positive, got {weights.tolist()}")
    total = sum(count for count, _ in parts)
    exact = total * weights / weights.sum()
    whole = np.floor(exact).astype(int)
    largest = np.argsort(whole - exact, kind="stable")[: total - whole.sum()]
    whole[largest] += 1
    if not whole.all():
        raise QloraError(
            f"weights {weights.tolist()} leave a dataset without any of an epoch's {total} examples"
        )
    return whole.tolist()


def epoch_order(parts: Parts, seed: int, epoch: int) -> np.ndarray:
    """Indices of the joined examples, [sum of counts], for one epoch: a pure function.

    One part: each example once. Several: every part is gone through in permutations of its own
    without end, of which each epoch takes the part's share; so a small part of high weight is seen
    several times in an epoch, and a large one goes on in the next where it stopped in this.
    """
    if len(parts) == 1:
        return np.random.default_rng([seed, epoch]).permutation(parts[0][0])
    drawn, offset = [], 0
    for number, ((count, _), share) in enumerate(zip(parts, shares(parts), strict=True)):
        first, last = epoch * share, (epoch + 1) * share
        passes = range(first // count, -(-last // count))
        whole = [np.random.default_rng([seed, p, 2 + number]).permutation(count) for p in passes]
        start = first - passes.start * count
        drawn.append(offset + np.concatenate(whole)[start : start + share])
        offset += count
    return np.random.default_rng([seed, epoch]).permutation(np.concatenate(drawn))


def mix(datasets: Sequence[TokenizedDataset], weights: Sequence[float]) -> TokenizedDataset:
    """Several datasets as one, of which an epoch draws examples in proportion to `weights`.

    Raises QloraError for datasets tokenized with another padding, and as `shares`.
    """
    if not datasets or len(datasets) != len(weights):
        raise QloraError(
            f"a mixture needs a weight for each dataset, got {len(datasets)} datasets and "
            f"{len(weights)} weights"
        )
    if len({(type(dataset), dataset.pad_id) for dataset in datasets}) > 1:
        raise QloraError("a mixture needs datasets tokenized alike, with one tokenizer")
    parts = tuple((len(d), float(w)) for d, w in zip(datasets, weights, strict=True))
    shares(parts)
    limits = [dataset.max_length for dataset in datasets if dataset.max_length is not None]
    return dataclasses.replace(
        datasets[0],
        examples=tuple(example for dataset in datasets for example in dataset),
        cut=sum(dataset.cut for dataset in datasets),
        dropped=sum(dataset.dropped for dataset in datasets),
        max_length=max(limits) if len(limits) == len(datasets) else None,
        parts=parts,
        today=next((dataset.today for dataset in datasets if dataset.today), None),
    )
