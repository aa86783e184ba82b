"""Rows from JSON lines files and from data sets of the Hugging Face Hub."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.errors import QloraError, missing

DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".zst"}

Row = tuple[str, object]
"""(where it is from, for errors; the row)."""


def read_rows(source: str | Path, split: str = "train") -> Iterator[Row]:
    """The rows of a JSON lines file, or of a data set of the Hub.

    The latter is "owner/name[:config][@split]"; `split` is the one of a name without any. Blank
    lines are skipped. Raises QloraError for a path that is not there, for a file that begins with
    an array, for what is no JSON, with file and line number, and for a source without rows.
    """
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return _json_lines(path)
    if path.is_dir():
        raise QloraError(f"{path}: a folder; expected a JSON lines file or a dataset's name")
    if _is_a_path(str(source)):
        raise QloraError(f"{path}: no such file")
    return _hub_dataset(str(source), split)


def _is_a_path(source: str) -> bool:
    """Whether a source cannot be the name of a data set."""
    return (
        source.startswith((".", "~", "/"))
        or source.count("/") > 1
        or Path(source).suffix in DATA_SUFFIXES
    )


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:  # some editors write a byte order mark
        try:
            if file.read(64).lstrip().startswith("["):
                raise QloraError(
                    f"{path}: begins with a JSON array; write its elements, one object a line"
                )
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise QloraError(
                        f"{where}: not JSON ({error.msg} at column {error.colno}); expected a JSON "
                        "object a line"
                    ) from error
                except (ValueError, RecursionError) as error:  # a number, a depth beyond Python's
                    raise QloraError(f"{where}: cannot be read ({error})") from error
                if "\\ud" in line.lower():
                    _refuse_half_characters(row, where)
                yield where, row
        except UnicodeDecodeError as error:
            raise QloraError(f"{path}: not UTF-8 text ({error.reason})") from error


def _refuse_half_characters(row: object, where: str) -> None:
    """Raises QloraError for one half of a pair of \\u escapes, as of an emoji cut in two."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise QloraError(
            f"{where}: has the text {half}, half of a character; its other half is missing"
        ) from error


def _hub_dataset(name: str, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing("datasets", f"reading the dataset {name!r}", "datasets") from error
    # "owner/name:config@split", as in openai/gsm8k:main@test.
    name, _, named = name.partition("@")
    split = named or split
    repository, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split)
    # It raises of every kind: for a name that is not there, a script, a damaged file.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QloraError(
            f"{name}: neither a file here nor a dataset that could be loaded ({reason})"
        ) from error
    return ((f"{name}[{split}], row {number}", row) for number, row in enumerate(rows))
