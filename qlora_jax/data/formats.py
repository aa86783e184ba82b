"""Datasets that instruction tuning is known by: rows as they have them, to source and target.

A format is named, never guessed: fields of one name mean different things in different datasets.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlora_jax.data.reading import read_rows
from qlora_jax.errors import QloraError

PairFormat = Literal[
    "alpaca",
    "chip2",
    "self-instruct",
    "hh-rlhf",
    "oasst1",
    "input-output",
    "longform",
    "unnatural-instructions",
    "text",
]


@dataclass(frozen=True)
class Pair:
    """Text that is read, and text that is learned after it; `where` names its origin in errors."""

    source: str
    target: str
    where: str = field(default="pair", compare=False)


# The two prompts of Stanford Alpaca, ending as in QLoRA's own program.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response: "
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)

Texts = Iterator[tuple[str, str]]
"""(source, target), as many as a row has."""


def _text(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise QloraError(f"no field {name!r}; found the fields {sorted(map(str, row))}")
    if not isinstance(row[name], str):
        raise QloraError(f"{name!r} is {type(row[name]).__name__}, not text")
    return row[name]


def _alpaca(row: Mapping[str, Any]) -> Texts:
    instruction, given = _text(row, "instruction"), row.get("input") or ""
    prompt = _ALPACA_WITH_INPUT if given else _ALPACA
    yield prompt.format(instruction=instruction, input=given), _text(row, "output")


def _chip2(row: Mapping[str, Any]) -> Texts:
    source, found, target = _text(row, "text").partition("\n<bot>: ")
    if not found:
        raise QloraError("'text' has no line that begins with '<bot>: '")
    yield source.replace("<human>: ", ""), target.partition("\n<bot>: ")[0]


def _unnatural(row: Mapping[str, Any]) -> Texts:
    instances: Any = row.get("instances")
    if isinstance(instances, Mapping):  # a Sequence of the datasets library: lists by field
        names: tuple[str, ...] = ("instruction_with_input", "output")
        columns = [instances.get(name) or () for name in names]
        if len({len(column) for column in columns}) > 1:
            raise QloraError(f"the lists {' and '.join(names)} of 'instances' differ in length")
        instances = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    if not isinstance(instances, (list, tuple)):
        raise QloraError(f"no list 'instances'; found the fields {sorted(map(str, row))}")
    for instance in instances:
        if not isinstance(instance, Mapping):
            raise QloraError(f"'instances' has {type(instance).__name__}, expected objects")
        yield _text(instance, "instruction_with_input"), _text(instance, "output")


def _fields(source: str | None, target: str) -> Callable[[Mapping[str, Any]], Texts]:
    def parse(row: Mapping[str, Any]) -> Texts:
        yield ("" if source is None else _text(row, source)), _text(row, target)

    return parse


FORMATS: dict[PairFormat, Callable[[Mapping[str, Any]], Texts]] = {
    "alpaca": _alpaca,
    "chip2": _chip2,
    "self-instruct": _fields("prompt", "completion"),
    "hh-rlhf": _fields(None, "chosen"),
    "oasst1": _fields(None, "text"),
    "input-output": _fields("input", "output"),
    "longform": _fields("input", "output"),
    "unnatural-instructions": _unnatural,
    "text": _fields(None, "text"),
}


def rows_to_pairs(rows: Iterable[object], format: PairFormat, name: str = "rows") -> list[Pair]:
    """Any iterable of mappings, a `datasets.Dataset` included, to pairs.

    Raises QloraError for an unknown format, naming the row's number on the first bad row, and if
    there is no row.
    """
    numbered = ((f"{name}, row {number}", row) for number, row in enumerate(rows))
    return _pairs(numbered, format, name)


def read_pairs(source: str | Path, format: PairFormat, split: str = "train") -> list[Pair]:
    """Reads a JSON lines file, or a dataset of the Hugging Face Hub, with rows of that format.

    source and split are as for `read_rows`, whose errors it raises, and those of `rows_to_pairs`.
    """
    return _pairs(read_rows(source, split), format, str(source))


def _pairs(rows: Iterable[tuple[str, object]], format: PairFormat, name: str) -> list[Pair]:
    if format not in FORMATS:
        raise QloraError(f"no dataset format {format!r}; known: {', '.join(FORMATS)}")
    pairs = []
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise QloraError(f"{where}: a row must be an object, not {type(row).__name__}")
        try:
            pairs += [Pair(source, target, where) for source, target in FORMATS[format](row)]
        except QloraError as error:
            raise QloraError(f"{where}: {error}; this is no row of format {format}") from error
    if not pairs:
        raise QloraError(f"{name}: no examples; expected rows of format {format}")
    return pairs
