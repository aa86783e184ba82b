"""A file of safetensors, checked by its package; tensors are mapped, not copied, into memory."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.json_files import parse_json
from qlora_jax.errors import QloraError, missing

FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types that weights may have, as the format calls them -> as NumPy and ml_dtypes do."""
_TYPES = (
    FLOATING
    | {"BOOL": "bool"}
    | {
        f"{kind[0].upper()}{bits}": f"{kind}{bits}"
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    }
)
"""All types that NumPy has."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in its file. kind: its type, as the format calls it; offset: of its first byte."""

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Its numbers, read-only and mapped: they change with the file, and take no memory of the
        process, where the package's own `get_tensor` makes a copy."""
        if self.kind not in _TYPES:
            raise QloraError(
                f"{self.file}: {self.name} is of type {self.kind}, expected {', '.join(_TYPES)}"
            )
        dtype = jnp.dtype(_TYPES[self.kind])
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        try:
            mapped = np.memmap(self.file, dtype, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise QloraError(
                f"{self.file}: {self.name} cannot be read ({error}); was the file changed?"
            ) from error
        return mapped.view(np.ndarray)


def read_header(file: Path) -> dict[str, Stored]:
    """Name -> tensor; QloraError for what is no file of safetensors, or not all of one."""
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise missing("safetensors", f"reading {file}", "hf") from error
    try:
        with safe_open(file, framework="np"), file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = opened.read(length)
    except (SafetensorError, OSError) as error:
        raise QloraError(
            f"{file}: cannot be read as safetensors ({error}); incomplete download?"
        ) from error
    try:
        tensors = parse_json(header)
    except QloraError as error:
        raise QloraError(f"{file}: {error}") from error
    tensors.pop("__metadata__", None)
    found = {}
    for name, about in tensors.items():
        begin, _ = about["data_offsets"]
        shape = tuple(about["shape"])
        found[name] = Stored(file, name, about["dtype"], shape, 8 + length + begin)
    return found
