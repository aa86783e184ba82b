"""Examples to arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np

from qlora_jax.errors import QloraError
from qlora_jax.models.loss import IGNORE


@dataclass(frozen=True, eq=False)
class TokenizedExample:
    """input_ids [T] and labels [T], int32. labels[t] is input_ids[t] or IGNORE: not shifted.

    Of pairs labels are [T] of the decoder, of texts to be classified [] or [C]: see the datasets.
    where: names its origin in messages.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    where: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


class Batch(TypedDict):
    """int32 arrays [B, T]; labels are not shifted, attention_mask is 1 on tokens, 0 on padding.

    segment_ids, where rows are packed: documents counted from 1 in each row, 0 on padding.
    token_type_ids, of texts to be classified: which text of a pair a token is in, 0 or 1. Other
    shapes of labels: see `Seq2SeqDataset` and `LabelledDataset`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    attention_mask: np.ndarray
    segment_ids: NotRequired[np.ndarray]
    token_type_ids: NotRequired[np.ndarray]


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


def pad(rows: Sequence[np.ndarray], length: int, fill: int) -> np.ndarray:
    """int32 [B, length]: each row padded on the right. Raises QloraError if one is longer."""
    out = np.full((len(rows), length), fill, np.int32)
    for row, values in zip(out, rows, strict=True):
        if len(values) > length:
            raise QloraError(f"{len(values)} tokens do not fit a length of {length}")
        row[: len(values)] = values
    return out
