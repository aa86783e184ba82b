"""Whether a GGUF file's header stays within the file, before the gguf package believes it.

The package reads lengths as they stand: an array that claims 2^60 numbers would keep it busy, and
its memory growing, for good. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import mmap
import struct
from pathlib import Path

from qlora_jax.errors import QloraError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the scalar types."""
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 8
_MAX_NESTING = 4


def check_header(path: Path) -> None:
    """Raises QloraError for lengths, counts and offsets that lead out of the file."""
    if path.stat().st_size < 24:
        raise QloraError(f"{path}: cannot be read as GGUF (too short); incomplete download?")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(path, data)
        try:
            walk.header()
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

    def skip(self, size: int, what: str) -> None:
        if size > len(self.data) - self.at:
            raise self.fault(f"{what} is {size} bytes long, {len(self.data) - self.at} are left")
        self.at += size

    def header(self) -> None:
        if self.data[:4] != b"GGUF":
            raise self.fault("it does not begin with GGUF")
        self.at = 4
        if self.number("I") not in (2, 3):
            raise self.fault("a version other than 2 and 3, or of a big-endian machine")
        tensors, entries = self.number("Q"), self.number("Q")
        for _ in range(entries):
            self.skip(self.number("Q"), "the name of an entry")
            self.value(self.number("I"), 0)
        for _ in range(tensors):
            self.skip(self.number("Q"), "the name of a tensor")
            dimensions = self.number("I")
            if dimensions > _MAX_DIMENSIONS:
                raise self.fault(f"a tensor with {dimensions} dimensions")
            elements = 1
            for _ in range(dimensions):
                elements *= self.number("Q")
            # No format has fewer than one bit an element.
            if elements > 8 * len(self.data):
                raise self.fault(f"a tensor of {elements} elements in {len(self.data)} bytes")
            self.number("I")
            if (offset := self.number("Q")) > len(self.data):
                raise self.fault(f"a tensor at byte {offset} of {len(self.data)}")

    def value(self, kind: int, depth: int) -> None:
        """Moves over a value of metadata."""
        if kind in _SIZES:
            self.skip(_SIZES[kind], "a number")
        elif kind == _STRING:
            self.skip(self.number("Q"), "a text")
        elif kind == _ARRAY and depth < _MAX_NESTING:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SIZES:
                self.skip(count * _SIZES[inner], f"an array of {count} numbers")
                return
            for _ in range(count):  # a text, an array: at least one number is read, or it ends
                self.value(inner, depth + 1)
        else:
            raise self.fault(f"no type of value has the number {kind}")
