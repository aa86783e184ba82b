"""Examples to arrays."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np

from qlora_jax.data.tokenize import IGNORE, TokenizedExample
from qlora_jax.errors import QloraError


class Batch(TypedDict):
    """int32 arrays [B, T]; labels are not shifted, attention_mask is 1 on tokens, 0 on padding.

    segment_ids, where rows are packed: documents counted from 1 in each row, 0 on padding.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    attention_mask: np.ndarray
    segment_ids: NotRequired[np.ndarray]


def collate(
    rows: Sequence[Sequence[TokenizedExample]], length: int, pad_id: int, *, packed: bool
) -> Batch:
    """The examples of each row one after another, padded on the right to [B, length].

    packed: with segment ids. The first token of an example is then not labelled: what stands before
    it is of another. Raises QloraError if the examples of a row are longer together.
    """
    shape = (len(rows), length)
    input_ids = np.full(shape, pad_id, np.int32)
    labels = np.full(shape, IGNORE, np.int32)
    segments = np.zeros(shape, np.int32)
    for row, examples in enumerate(rows):
        size = sum(map(len, examples))
        if size > length:
            raise QloraError(
                f"a row of {len(examples)} examples with {size} tokens does not fit sequence "
                f"length {length}"
            )
        start = 0
        for number, example in enumerate(examples, start=1):
            place = slice(start, start + len(example))
            input_ids[row, place] = example.input_ids
            labels[row, place] = example.labels
            segments[row, place] = number
            if packed:
                labels[row, start] = IGNORE
            start = place.stop
    attention_mask = (segments > 0).astype(np.int32)
    batch = Batch(input_ids=input_ids, labels=labels, attention_mask=attention_mask)
    if packed:
        batch["segment_ids"] = segments
    return batch
