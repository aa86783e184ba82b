"""Which documents go together into a row of fixed length."""

from bisect import bisect_left, insort

import numpy as np

WINDOW = 4096
"""Documents that are packed together. Their rows are about full, and since each epoch has other
windows, a document has other company each time."""


def pack(order: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs documents into rows of at most `capacity` tokens, best fit, the longest first.

    order    [N] indices into lengths: window by window they are packed
    lengths  tokens of each document, at most `capacity`

    Returns (order [N], bounds [M + 1]): row r has the documents order[bounds[r]:bounds[r + 1]].
    """
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        rows += _best_fit(order[start : start + WINDOW], lengths, capacity)
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return np.concatenate([np.asarray(row) for row in rows]), bounds


def _best_fit(window: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that a row still has room for, its number), sorted
    for document in window[np.argsort(-lengths[window], kind="stable")].tolist():
        size = int(lengths[document])
        place = bisect_left(rooms, (size, 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
            rows[number].append(document)
        else:
            room, number = capacity, len(rows)
            rows.append([document])
        insort(rooms, (room - size, number))
    return rows
