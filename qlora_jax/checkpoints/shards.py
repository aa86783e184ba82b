"""Tensors written to safetensors as they come, in shards of bounded size, one in memory at a time.

The format (https://github.com/huggingface/safetensors): the length of a JSON header, the header,
which says where each tensor lies, and the tensors without gaps. The header comes first and is known
last, so that a shard's tensors are first written to a file beside it.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.checkpoints.safetensors_files import TYPES
from qlora_jax.checkpoints.tensors import INDEX, SINGLE
from qlora_jax.errors import QloraError

SHARD_BYTES = 5 * 10**9
"""Of a file at most, unless one tensor alone is larger."""

_KINDS = {name: kind for kind, name in TYPES.items()}


def write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """model.safetensors in `folder`, or several files and their index if it would be too large."""
    shards = [_Shard(folder / "0.raw")]
    for name, x in tensors:
        if shards[-1].size and shards[-1].size + x.nbytes > SHARD_BYTES:
            shards.append(_Shard(folder / f"{len(shards)}.raw"))
        shards[-1].add(name, x)
        del x  # before the next one is made
    if len(shards) == 1:
        shards[0].write(folder / SINGLE)
        return
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        shard.write(folder / name)
        weight_map |= dict.fromkeys(shard.entries, name)
    index = {
        "metadata": {"total_size": sum(shard.size for shard in shards)},
        "weight_map": weight_map,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Shard:
    """Tensors in the order they come, in a file of their own until all are known."""

    def __init__(self, raw: Path) -> None:
        self.size = 0
        self.entries: dict[str, tuple[np.dtype[Any], tuple[int, ...], int, int]] = {}
        self._raw = raw

    def add(self, name: str, x: np.ndarray) -> None:
        if name in self.entries:
            raise QloraError(f"{name}: two tensors of this name")
        self.entries[name] = x.dtype, x.shape, self.size, x.nbytes
        # By its bytes, as bfloat16 is no type of NumPy's own.
        with self._raw.open("ab") as file:
            file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        self.size += x.nbytes

    def write(self, path: Path) -> None:
        """The shard as a safetensors file, the widest numbers first, so that all lie aligned."""
        names = sorted(self.entries, key=lambda name: (-self.entries[name][0].itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            dtype, shape, _, nbytes = self.entries[name]
            header[name] = {
                "dtype": _KINDS[dtype.name],
                "shape": list(shape),
                "data_offsets": [at, at + nbytes],
            }
            at += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self._raw.open("rb") as raw, path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                _, _, start, nbytes = self.entries[name]
                raw.seek(start)
                _copy(raw, file, nbytes)
        self._raw.unlink()


def _copy(source: Any, target: Any, size: int) -> None:
    while size:
        piece = source.read(min(size, 1 << 24))
        target.write(piece)
        size -= len(piece)
