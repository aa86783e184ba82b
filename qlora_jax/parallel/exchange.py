"""Python objects from every process to every other."""

import pickle
from typing import Any

import jax
import numpy as np

AT_ONCE = 2**26
"""Bytes that an exchange takes of each device at a time, however much there is to exchange."""


def gather(value: Any) -> list[Any]:
    """`value` of each process, in their order; all processes must call this together.

    They are pickled, and travel as the devices' arrays do: up to 4 GiB of each process.
    """
    from jax.experimental import multihost_utils

    count = jax.process_count()
    if count == 1:
        return [value]
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(own.size, np.uint32)).tolist()
    piece = min(max(sizes), AT_ONCE // count)
    parts: list[list[np.ndarray]] = [[] for _ in sizes]
    for start in range(0, max(sizes), piece):
        sent = np.zeros(piece, np.uint8)
        rest = own[start : start + piece]
        sent[: rest.size] = rest
        for part, got in zip(parts, multihost_utils.process_allgather(sent), strict=True):
            part.append(got)
    return [
        pickle.loads(np.concatenate(part)[:size].tobytes())
        for part, size in zip(parts, sizes, strict=True)
    ]
