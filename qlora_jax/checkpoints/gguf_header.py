"""The header of a GGUF file: metadata, and where its tensors lie.

Read here and not by the gguf package, which believes every length it finds, so that a damaged file
can keep it busy and its memory growing for good, and makes an array of every token of a vocabulary.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import math
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
_MAX_DIMENSIONS = 8
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
    """Metadata as Python's numbers, texts and lists, and the tensors, each by its name."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: Path) -> Header:
    """Raises QloraError for a file that is none of GGUF's versions 2 and 3, and for lengths, counts
    and offsets that lead out of it."""
    if path.stat().st_size < 24:
        raise QloraError(f"{path}: cannot be read as GGUF (too short); incomplete download?")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(path, data)
        try:
            return walk.header()
        except struct.error as error:
            raise walk.fault("it ends in the middle of its header") from error


class _Walk:
    """A position in the file that moves over one entry after the other."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fault(self, what: str) -> QloraError:
        return QloraError(
            f"{self.path}: cannot be read as GGUF ({what}, at byte {self.at}); incomplete download?"
        )

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.data) - self.at:
            raise self.fault(f"{what} is {size} bytes long, {len(self.data) - self.at} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self, what: str) -> str:
        read = self.take(self.number("Q"), what)
        try:
            return read.decode()
        except UnicodeDecodeError as error:
            raise self.fault(f"{what} is not UTF-8") from error

    def header(self) -> Header:
        if self.take(4, "the first word") != b"GGUF":
            raise self.fault("it does not begin with GGUF")
        if self.number("I") not in (2, 3):
            raise self.fault("a version other than 2 and 3, or of a big-endian machine")
        count, entries = self.number("Q"), self.number("Q")
        fields: dict[str, Any] = {}
        for _ in range(entries):
            name = self.text("the name of an entry")
            if name in fields:
                raise self.fault(f"two entries {name}")
            fields[name] = self.value(self.number("I"), 0)
        tensors: dict[str, Tensor] = {}
        for _ in range(count):
            name = self.text("the name of a tensor")
            if name in tensors:
                raise self.fault(f"two tensors {name}")
            tensors[name] = self.tensor()
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.fault(f"general.alignment is {alignment!r} and not a power of two")
        data = self.at + -self.at % alignment
        return Header(
            fields,
            {name: dataclasses.replace(t, start=data + t.start) for name, t in tensors.items()},
        )

    def tensor(self) -> Tensor:
        """One whose data begin `start` bytes after the header."""
        dimensions = self.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise self.fault(f"a tensor with {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        elements = math.prod(shape)
        # No format has fewer than one bit an element.
        if elements > 8 * len(self.data):
            raise self.fault(f"a tensor of {elements} elements in {len(self.data)} bytes")
        kind, start = self.number("I"), self.number("Q")
        if start > len(self.data):
            raise self.fault(f"a tensor at byte {start} of {len(self.data)}")
        return Tensor(shape, kind, start)

    def value(self, kind: int, depth: int) -> Any:
        """A value of metadata."""
        if kind in _SCALARS:
            return self.numbers(kind, 1)[0]
        if kind == _STRING:
            return self.text("a text")
        if kind == _ARRAY and depth < _MAX_NESTING:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                return self.numbers(inner, count)
            # A text, an array: at least one number is read for each, or the file ends.
            return [self.value(inner, depth + 1) for _ in range(count)]
        raise self.fault(f"no type of value has the number {kind}")

    def numbers(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        what = "a number" if count == 1 else f"an array of {count} numbers"
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype).tolist()
