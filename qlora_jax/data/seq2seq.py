"""Prompts and answers to token ids, for an encoder that reads the one and a decoder that writes the
other."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_jax.data.collate import Batch, TokenizedExample, pad
from qlora_jax.data.convert import convert
from qlora_jax.data.examples import Example
from qlora_jax.data.formats import Pair
from qlora_jax.data.lengths import rounded
from qlora_jax.data.tokenize import TokenizedDataset, padding_id
from qlora_jax.errors import QloraError
from qlora_jax.models.loss import IGNORE


@dataclass(frozen=True, repr=False)
class Seq2SeqDataset(TokenizedDataset):
    """Of each example input_ids [E] are what the encoder reads, labels [T] what is to be said."""

    def collate(
        self, rows: Sequence[Sequence[TokenizedExample]], length: int, *, packed: bool = False
    ) -> Batch:
        """input_ids and attention_mask [B, length] of the encoder, labels [B, T] of the decoder.

        T is the longest answer's in the dataset, rounded up, so that all batches have one shape.
        """
        if packed or any(len(row) != 1 for row in rows):
            raise QloraError("packing is for decoders; pairs of texts have a row each")
        examples = [example for (example,) in rows]
        ids = [example.input_ids for example in examples]
        return Batch(
            input_ids=pad(ids, length, self.pad_id),
            labels=pad([example.labels for example in examples], self._longest_answer, IGNORE),
            attention_mask=pad([np.ones(len(x), np.int32) for x in ids], length, 0),
        )

    @functools.cached_property
    def _longest_answer(self) -> int:
        return rounded(max(len(example.labels) for example in self.examples))


def tokenize_seq2seq(
    rows: Sequence[Example] | Sequence[Pair],
    tokenizer: Any,
    *,
    source_max_length: int = 1024,
    target_max_length: int = 256,
    share: bool = False,
) -> Seq2SeqDataset:
    """The source, or the turns before the answer, a line each, for the encoder; the target, or the
    answer, for the decoder.

    Both with the special tokens that the tokenizer adds (T5: the end), and cut to at most so many
    tokens; a pair without a target is dropped. share: as of `tokenize`. Raises QloraError for
    limits that leave no room, and if no example is left.
    """
    if source_max_length < 2 or target_max_length < 2:
        raise QloraError(
            "source_max_length and target_max_length must be at least 2, got "
            f"{source_max_length} and {target_max_length}"
        )

    def one(row: Example | Pair) -> tuple[TokenizedExample, bool] | None:
        source, target = (row.source, row.target) if isinstance(row, Pair) else _texts(row)
        if not target:
            return None
        read, cut_source = encode_whole(tokenizer, (source,), source_max_length)
        said, cut_target = encode_whole(tokenizer, (target,), target_max_length)
        ids, labels = (np.asarray(x["input_ids"], np.int32) for x in (read, said))
        return TokenizedExample(ids, labels, row.where), cut_source or cut_target

    kept, cut = convert(rows, one, share)
    if not kept:
        raise QloraError(f"none of {len(rows)} examples has a target")
    dropped = len(rows) - len(kept)
    return Seq2SeqDataset(kept, padding_id(tokenizer), cut, dropped, source_max_length)


def _texts(example: Example) -> tuple[str, str]:
    return "\n".join(message.content for message in example.prompt), example.answer


def encode_whole(
    tokenizer: Any, texts: Sequence[str], limit: int
) -> tuple[Mapping[str, list[int]], bool]:
    """What the tokenizer makes of a text or a pair, special tokens included, and whether it had to
    be cut."""
    encoded = tokenizer(*texts)
    cut = len(encoded["input_ids"]) > limit
    if cut:
        encoded = tokenizer(*texts, truncation=True, max_length=limit)
    return encoded, cut
