"""Settings for what is trained on: sources, formats, lengths, and what is held out."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.checkpoints.encoder import EncoderModel
from qlora_jax.checkpoints.seq2seq import Seq2SeqModel
from qlora_jax.data import (
    Example,
    LabelledText,
    Labels,
    Pair,
    PairFormat,
    TokenizedDataset,
    mix,
    read_examples,
    read_labelled,
    read_pairs,
    tokenize,
    tokenize_labelled,
    tokenize_pairs,
    tokenize_seq2seq,
)
from qlora_jax.data.tokenize import Template
from qlora_jax.errors import QloraError

DatasetFormat = Literal["auto", "classification", PairFormat]
Rows = Sequence[Example] | Sequence[Pair] | Sequence[LabelledText]


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
    "answer"}, told by their fields; classification: a "label" beside "text", "sentence" or two
    texts, as GLUE has them; the others: as qlora.py names them, and text ({"text"})."""
    eval_data: str | None = None
    """Held-out rows, from the same kinds of places; not the rows of --data."""
    eval_count: int = 0
    """Without --eval-data: hold out so many rows of --data, chosen by --training.seed."""
    max_length: int = 1024
    """Tokens of an example of format auto or classification; longer ones are cut on the right."""
    source_max_length: int = 1024
    """In the other formats, and of an encoder-decoder: tokens of the source, which is read."""
    target_max_length: int = 256
    """In the other formats, and of an encoder-decoder: tokens of the target, which is learned."""
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

    def longest(self, encoder_decoder: bool) -> int:
        """The most tokens that a row of the model may have; of an encoder-decoder on either
        side."""
        if encoder_decoder:
            return max(self.source_max_length, self.target_max_length)
        pairs = self.source_max_length + self.target_max_length
        return max([pairs if kind else self.max_length for kind in self._pairs()])

    def cut_to(self, tokens: int, encoder_decoder: bool) -> str:
        """Options by which no row of the model is longer; see `longest`."""
        source, target = self.source_max_length, self.target_max_length
        if encoder_decoder:
            pairs, source, target = {True}, min(source, tokens), min(target, tokens)
        else:
            # What is learned goes first, up to half of the row, or more where the source is short.
            pairs, source = self._pairs(), min(source, tokens - min(target, tokens // 2))
            target = min(target, tokens - source)
        whole = f"--max-length {min(self.max_length, tokens)}"
        both = f"--source-max-length {source} --target-max-length {target}"
        return " ".join([whole] * (False in pairs) + [both] * (True in pairs))

    def _pairs(self) -> set[bool]:
        """Of each source: whether its rows are a source and a target, each of its own length."""
        whole = {"auto", "classification"}
        formats = [Source.parse(text).format or self.dataset_format for text in self.data]
        return {kind not in whole for kind in formats} or {False}

    def labels(self, *sources: Sequence[Rows]) -> Labels | None:
        """What there is to predict, if the rows are to be classified. Raises as `Labels.of`."""
        rows = [row for part in sources for rows in part for row in rows]
        labelled = [row for row in rows if isinstance(row, LabelledText)]
        if labelled and len(labelled) < len(rows):
            raise QloraError("rows of format classification cannot be mixed with others")
        return Labels.of(labelled) if labelled else None

    def tokenize(
        self, rows: Any, model: AnyModel, labels: Labels | None, today: str | None = None
    ) -> TokenizedDataset:
        """One source's rows as the model takes them; of several processes, which must all call
        this, each tokenizes a part. Raises QloraError as `data.tokenize` and its kin, and for rows
        that are not what the model is trained on."""
        if isinstance(model, EncoderModel) != (labels is not None):
            raise QloraError(
                f"{model!r}: --dataset-format classification is for encoders, and what they need"
            )
        lengths = {
            "source_max_length": self.source_max_length,
            "target_max_length": self.target_max_length,
        }
        if labels is not None:
            return tokenize_labelled(rows, model.tokenizer, self.max_length, labels, share=True)
        if isinstance(model, Seq2SeqModel):
            return tokenize_seq2seq(rows, model.tokenizer, **lengths, share=True)
        if isinstance(rows[0], Example):
            how: Any = {"share": True, "today": today}
            return tokenize(rows, model.tokenizer, self.max_length, self.template, **how)
        learn = self.train_on_source
        return tokenize_pairs(rows, model.tokenizer, **lengths, train_on_source=learn, share=True)

    def tokenize_all(
        self,
        sources: Sequence[Rows],
        weights: Sequence[float] | None,
        model: AnyModel,
        labels: Labels | None,
        today: str | None = None,
    ) -> TokenizedDataset:
        """All sources as one, mixed by their weights; None: each example once an epoch. today: as
        of `data.tokenize`."""
        datasets: list[TokenizedDataset] = []
        for rows in sources:
            datasets.append(self.tokenize(rows, model, labels, today))
            today = today or datasets[-1].today  # one day for all
        return mix(datasets, weights or [len(dataset) for dataset in datasets])

    def _read(self, source: Source) -> Rows:
        format: Any = source.format or self.dataset_format
        if format == "auto":
            return read_examples(source.path)
        if format == "classification":
            return read_labelled(source.path)
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
