"""The header of a GGUF file: metadata, and where its tensors lie.

Read here and not by the gguf package, which believes every length it finds, so that a damaged file
can keep it busy and its memory growing for good, and makes an array of every token of a vocabulary.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.errors import QloraError

_SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_NESTING = 4


@dataclasses.dataclass(frozen=True)
class Tensor:
    """shape, the slowest axis first; the number of its type, as ggml counts them; where its data
    begin, in bytes from the beginning of the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata and the tensors, each by its name.

    Metadata are Python's numbers and texts, NumPy's arrays of numbers, and lists of these; bytes
    stand for a text that is not UTF-8.
    """

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: Path) -> Header:
    """Raises QloraError for a file that is none of GGUF's versions 2 and 3, and for lengths and
    counts that lead out of it. Where a tensor ends depends on its type, which is not looked at."""
    if path.stat().st_size < 24:
        raise QloraError(f"{path}: cannot be read as GGUF (too short); incomplete download?")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(path, data)
        try:
            return walk.header()
        except struct.error as error:
            raise walk.cut("it ends in the middle of its header") from error


class _Walk:
    """A position in the file that moves over one entry after the other."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fault(self, what: str) -> QloraError:
        return QloraError(f"{self.path}: cannot be read as GGUF ({what}, at byte {self.at})")

    def cut(self, what: str) -> QloraError:
        return QloraError(f"{self.fault(what)}; incomplete download?")

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.data) - self.at:
            raise self.cut(f"{what} is {size} bytes long, {len(self.data) - self.at} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self, what: str) -> str | bytes:
        read = self.take(self.number("Q"), what)
        try:
            return read.decode()
        except UnicodeDecodeError:
            return read

    def name(self, of: str) -> str:
        if isinstance(name := self.text(f"the name of {of}"), bytes):
            raise self.fault(f"the name of {of} is not UTF-8")
        return name

    def header(self) -> Header:
        if self.take(4, "the first word") != b"GGUF":
            raise self.fault("it does not begin with GGUF")
        if self.number("I") not in (2, 3):
            raise self.fault("a version other than 2 and 3, or of a big-endian machine")
        count, entries = self.number("Q"), self.number("Q")
        fields: dict[str, Any] = {}
        for _ in range(entries):
            name = self.name("an entry")
            if name in fields:
                raise self.fault(f"two entries {name!r}")
            fields[name] = self.value(name, self.number("I"), 0)
        tensors: dict[str, Tensor] = {}
        for _ in range(count):
            name = self.name("a tensor")
            if name in tensors:
                raise self.fault(f"two tensors {name!r}")
            tensors[name] = self.tensor(name)
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.fault(f"general.alignment is {alignment!r} and not a power of two")
        data = self.at + -self.at % alignment
        return Header(
            fields,
            {name: dataclasses.replace(t, start=data + t.start) for name, t in tensors.items()},
        )

    def tensor(self, name: str) -> Tensor:
        """One whose data begin `start` bytes after the header."""
        dimensions = self.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise self.fault(f"{name!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1] or (1,)
        if 0 in shape:
            raise self.fault(f"{name!r} has the shape {shape}")
        return Tensor(shape, self.number("I"), self.number("Q"))

    def value(self, name: str, kind: int, depth: int) -> Any:
        """A value of metadata, of the entry of that name."""
        if kind in _SCALARS:
            return self.numbers(name, kind, 1).item()
        if kind == _STRING:
            return self.text(f"a text of {name!r}")
        if kind == _ARRAY and depth < _MAX_NESTING:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                return self.numbers(name, inner, count)
            # A text, an array: at least one number is read for each, or the file ends.
            return [self.value(name, inner, depth + 1) for _ in range(count)]
        raise self.fault(f"{name!r}: no type of value has the number {kind}")

    def numbers(self, name: str, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        what = "a number" if count == 1 else f"an array of {count} numbers"
        return np.frombuffer(self.take(count * dtype.itemsize, f"{name!r}, {what},"), dtype)
