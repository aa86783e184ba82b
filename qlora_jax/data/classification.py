"""Texts with a label each: classes, or numbers to predict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.data.collate import Batch, TokenizedExample, pad
from qlora_jax.data.convert import convert
from qlora_jax.data.reading import read_rows
from qlora_jax.data.seq2seq import encode_whole
from qlora_jax.data.tokenize import TokenizedDataset, padding_id
from qlora_jax.errors import QloraError
from qlora_jax.models.loss import IGNORE

# What is read: one text, or two that are read together. The names are those of GLUE's tasks.
FIELDS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
EXPECTED = 'a "label" beside ' + ", ".join(" + ".join(fields) for fields in FIELDS)

MOST_CLASSES = 10_000
"""Whole numbers that would make more classes are taken for a mistake."""
SURELY_CLASSES = 1_000
"""So many there may be whatever the number of rows; beyond, no more than rows."""


@dataclass(frozen=True)
class LabelledText:
    """One text or two, and a class (its number or its name) or a number to predict."""

    texts: tuple[str, ...]
    label: int | str | float
    where: str = "example"


@dataclass(frozen=True)
class Labels:
    """What there is to predict: the names of classes, in order, or, None, a number."""

    names: tuple[str, ...] | None

    @classmethod
    def of(cls, examples: Sequence[LabelledText]) -> "Labels":
        """Whole numbers are classes from 0 on, texts the names of classes, other numbers numbers.

        Raises QloraError for labels of different kinds, for negative classes, which GLUE has where
        the answer is a secret, for a single name, and for whole numbers too large to be classes.
        """
        kinds = {type(example.label) for example in examples}
        if kinds == {str}:
            names = sorted({str(example.label) for example in examples})
            if len(names) < 2:
                raise QloraError(
                    f"{examples[0].where}: every row has the label {names[0]!r}, which leaves "
                    "nothing to learn; give rows of at least two classes"
                )
            return cls(tuple(names))
        if kinds == {int}:
            for example in examples:
                if int(example.label) < 0:
                    raise QloraError(f"{example.where}: the class {example.label} is negative")
            most = max(examples, key=lambda example: int(example.label))
            count = 1 + int(most.label)
            if count > MOST_CLASSES or count > max(len(examples), SURELY_CLASSES):
                raise QloraError(
                    f"{most.where}: the label {most.label} would make {count:,} classes of "
                    f"{len(examples):,} rows, so the column does not look like classes; number "
                    "these from 0 on, or write numbers to predict with a decimal point"
                )
            return cls(tuple(f"LABEL_{i}" for i in range(max(count, 2))))
        if kinds <= {int, float}:
            return cls(None)
        raise QloraError(f"labels are of different kinds: {sorted(k.__name__ for k in kinds)}")

    def array(self, example: LabelledText) -> np.ndarray:
        """The label as an array []: int32 of a class, fp32 of a number. QloraError if unknown."""
        label = example.label
        if self.names is None:
            if isinstance(label, str) or not math.isfinite(label):
                raise QloraError(f"{example.where}: the label {label!r} is not a finite number")
            return np.asarray(label, np.float32)
        if label in self.names:
            return np.asarray(self.names.index(str(label)), np.int32)
        if not isinstance(label, int) or not 0 <= label < len(self.names):
            raise QloraError(f"{example.where}: the label {label!r} is none of {self.names}")
        return np.asarray(label, np.int32)


def parse_labelled(row: object, where: str) -> LabelledText:
    """A row of a data set. Raises QloraError, beginning with `where`, for one without texts or
    label."""
    if not isinstance(row, Mapping):
        raise QloraError(f"{where}: a row must be an object, not {type(row).__name__}")
    fields = next((names for names in FIELDS if all(name in row for name in names)), None)
    if fields is None or "label" not in row:
        raise QloraError(f"{where}: found the fields {sorted(map(str, row))}; expected {EXPECTED}")
    for name in fields:
        if not isinstance(row[name], str):
            raise QloraError(f"{where}: {name!r} is {type(row[name]).__name__}, not text")
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        raise QloraError(f"{where}: the label {label!r} is neither a number nor a name")
    return LabelledText(tuple(row[name] for name in fields), label, where)


def read_labelled(source: str | Path) -> list[LabelledText]:
    """Reads a JSON lines file, or a data set of the Hugging Face Hub, as `read_rows` does.

    Raises QloraError as that and `parse_labelled`, and if there is no row.
    """
    examples = [parse_labelled(row, where) for where, row in read_rows(source)]
    if not examples:
        raise QloraError(f"{source}: no examples; expected rows with {EXPECTED}")
    return examples


@dataclass(frozen=True, eq=False)
class LabelledExample(TokenizedExample):
    """input_ids [T], labels [] and, of a model that tells two texts apart, token_type_ids [T]."""

    token_type_ids: np.ndarray | None = None


@dataclass(frozen=True, repr=False)
class LabelledDataset(TokenizedDataset):
    """Of each example input_ids [T] are the texts, labels [] the class or the number."""

    def collate(
        self, rows: Sequence[Sequence[TokenizedExample]], length: int, *, packed: bool = False
    ) -> Batch:
        """input_ids, attention_mask, perhaps token_type_ids [B, length]; labels [B]."""
        if packed or any(len(row) != 1 for row in rows):
            raise QloraError("packing is for decoders; texts to be classified have a row each")
        ids = [example.input_ids for (example,) in rows]
        batch = Batch(
            input_ids=pad(ids, length, self.pad_id),
            labels=np.stack([example.labels for (example,) in rows]),
            attention_mask=pad([np.ones(len(x), np.int32) for x in ids], length, 0),
        )
        types = [getattr(example, "token_type_ids", None) for (example,) in rows]
        if all(x is not None for x in types):
            batch["token_type_ids"] = pad([x for x in types if x is not None], length, 0)
        return batch

    @property
    def filler(self) -> LabelledExample | None:
        """As of other datasets; None where numbers are predicted: none can be left out."""
        first = self.examples[0]
        if first.labels.dtype.kind == "f":
            return None
        typed = getattr(first, "token_type_ids", None) is not None
        return LabelledExample(
            input_ids=np.full(1, self.pad_id, np.int32),
            labels=np.asarray(IGNORE, np.int32),
            token_type_ids=np.zeros(1, np.int32) if typed else None,
        )


def tokenize_labelled(
    examples: Sequence[LabelledText],
    tokenizer: Any,
    max_length: int,
    labels: Labels,
    *,
    share: bool = False,
) -> LabelledDataset:
    """Texts with the tokenizer's special tokens, cut to max_length, and their labels' numbers.

    Of two texts the longer one is cut. token_type_ids are those of a tokenizer that has them.
    share: as of `tokenize`. Raises QloraError for a label that is unknown.
    """

    def one(example: LabelledText) -> tuple[TokenizedExample, bool]:
        encoded, was_cut = encode_whole(tokenizer, example.texts, max_length)
        types = encoded.get("token_type_ids")
        types = None if types is None else np.asarray(types, np.int32)
        ids = np.asarray(encoded["input_ids"], np.int32)
        return LabelledExample(ids, labels.array(example), example.where, types), was_cut

    kept, cut = convert(examples, one, share)
    return LabelledDataset(kept, padding_id(tokenizer), cut, 0, max_length)
