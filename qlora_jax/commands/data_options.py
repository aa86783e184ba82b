"""Settings for what is trained on: sources, formats, lengths, and what is held out."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from qlora_jax.data import (
    Example,
    Pair,
    PairFormat,
    TokenizedDataset,
    mix,
    read_examples,
    read_pairs,
    tokenize,
    tokenize_pairs,
)
from qlora_jax.data.tokenize import Template
from qlora_jax.errors import QloraError

DatasetFormat = Literal["auto", PairFormat]
Rows = Sequence[Example] | Sequence[Pair]


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of --data: PATH[,format=FORMAT][,weight=WEIGHT]."""

    path: str
    format: str | None = None
    weight: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Raises QloraError for an unknown format and a weight that is no number."""
        path, options = text, {}
        while True:  # from the right, so that a path may have commas
            head, comma, option = path.rpartition(",")
            name, equals, value = option.partition("=")
            if not (comma and equals and name in ("format", "weight")):
                break
            path, options[name] = head, value
        known = get_args(DatasetFormat)
        if options.get("format", "auto") not in known:
            raise QloraError(f"{text}: no format {options['format']!r}; known: {', '.join(known)}")
        try:
            weight = float(options["weight"]) if "weight" in options else None
        except ValueError as error:
            raise QloraError(f"{text}: weight {options['weight']!r} is no number") from error
        return cls(path, options.get("format"), weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is trained on."""

    data: tuple[str, ...]
    """JSON lines files, or data sets on the Hugging Face hub, "owner/name[:config][@split]" (of the
    split "train" if none is named). Each may be followed by ",format=FORMAT" and ",weight=WEIGHT":
    of several, an epoch has examples in proportion to their weights; without weights, all once."""
    dataset_format: DatasetFormat = "auto"
    """How rows are to be read; auto: {"messages": [...]}, {"prompt", "completion"} or {"question",
    "answer"}, told by their fields; the others: as qlora.py names them, and text ({"text"})."""
    eval_data: str | None = None
    """Held-out rows, from the same kinds of places; not the rows of --data."""
    eval_count: int = 0
    """Without --eval-data: hold out so many rows of --data, chosen by --training.seed."""
    max_length: int = 1024
    """Tokens of an example of format auto; longer ones are cut on the right."""
    source_max_length: int = 1024
    """In the other formats: tokens of the source, which is read."""
    target_max_length: int = 256
    """In the other formats: tokens of the target, which is learned."""
    train_on_source: bool = False
    """In the other formats: learn the source too."""
    template: Template = "auto"
    """In format auto. chat: the tokenizer's chat template; plain: prompt, then answer; auto: chat
    if it has one."""

    def read(self, seed: int) -> tuple[list[Rows], list[Rows], list[float] | None]:
        """(rows to train on of each source, held-out rows of each, the sources' weights).

        Raises QloraError for rows that cannot be read, the same rows in both, and weights for some
        of the sources only.
        """
        if not self.data:
            raise QloraError("--data needs at least one source")
        sources = [Source.parse(text) for text in self.data]
        given = [source.weight for source in sources if source.weight is not None]
        if given and len(given) < len(sources):
            raise QloraError("--data: give a weight to each source or to none")
        train = [self._read(source) for source in sources]
        weights = given or None
        if self.eval_data:
            held_out = self._read(Source.parse(self.eval_data))
            if any(list(rows) == list(held_out) for rows in train):
                raise QloraError(
                    f"--eval-data {self.eval_data} has the same rows as --data "
                    f"{' '.join(self.data)}; give others, of the hub another split "
                    '("owner/name@test"), or hold some out by --eval-count'
                )
            return train, [held_out], weights
        if not self.eval_count:
            return train, [], weights
        train, held_out = _split(train, self.eval_count, seed)
        for source, rows in zip(sources, train, strict=True):
            if not rows:
                raise QloraError(
                    f"--eval-count {self.eval_count} leaves no row of {source.path} to train on"
                )
        return train, held_out, weights

    def tokenize(self, rows: Rows, tokenizer: Any) -> TokenizedDataset:
        """One source's rows as token ids. Raises QloraError as `data.tokenize`."""
        pairs = [row for row in rows if isinstance(row, Pair)]
        if not pairs:
            examples = [row for row in rows if isinstance(row, Example)]
            return tokenize(examples, tokenizer, self.max_length, self.template)
        return tokenize_pairs(
            pairs,
            tokenizer,
            source_max_length=self.source_max_length,
            target_max_length=self.target_max_length,
            train_on_source=self.train_on_source,
        )

    def tokenize_all(
        self, sources: Sequence[Rows], weights: Sequence[float] | None, tokenizer: Any
    ) -> TokenizedDataset:
        """All sources as one, mixed by their weights; None: each example once an epoch."""
        datasets = [self.tokenize(rows, tokenizer) for rows in sources]
        return mix(datasets, weights or [len(dataset) for dataset in datasets])

    def _read(self, source: Source) -> Rows:
        format: Any = source.format or self.dataset_format
        if format == "auto":
            return read_examples(source.path)
        if self.template == "chat":
            raise QloraError(
                f"{source.path}: --template chat is for conversations; prompts of format {format} "
                "are whole as they are"
            )
        return read_pairs(source.path, format)


def _split(sources: list[Rows], count: int, seed: int) -> tuple[list[Rows], list[Rows]]:
    """`count` rows of all sources together are held out: a pure function of the seed."""
    total = sum(map(len, sources))
    if not 0 < count < total:
        raise QloraError(f"--eval-count {count} leaves none of {total} rows to train on")
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng([seed, 0x5EED]).permutation(total)[:count]] = True
    train, held_out, start = [], [], 0
    for rows in sources:
        out = chosen[start : start + len(rows)]
        train.append([row for row, held in zip(rows, out, strict=True) if not held])
        held_out.append([row for row, held in zip(rows, out, strict=True) if held])
        start += len(rows)
    return train, [rows for rows in held_out if rows]
