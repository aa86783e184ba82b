"""A file of safetensors, checked by its package; tensors are mapped, not copied, into memory."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.json_files import parse_json
from qlora_jax.errors import QloraError, missing
from qlora_jax.models.typed import needed

FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types that weights may have, as the format calls them -> as NumPy and ml_dtypes do."""
TYPES = FLOATING | {
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""All types that are read and written."""


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
        if self.kind not in TYPES:
            raise QloraError(
                f"{self.file}: {self.name} has the type {self.kind}, expected floating-point "
                "numbers of at least 16 bits"
            )
        dtype = jnp.dtype(TYPES[self.kind])
        try:
            if 0 in self.shape:  # which nothing can be mapped for
                return np.zeros(self.shape, dtype)
            mapped = np.memmap(self.file, dtype, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise QloraError(f"{self.file}: {self.name} cannot be read ({error})") from error
        return mapped.view(np.ndarray)


def read_header(file: Path) -> dict[str, Stored]:
    """Name -> tensor; QloraError for what is no file of safetensors, or not all of one."""
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise missing("safetensors", f"reading {file}", "hf") from error
    try:
        with safe_open(file, framework="np") as opened, file.open("rb") as raw:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            about = {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}
            length = int.from_bytes(raw.read(8), "little")
            header = raw.read(length)
    except (SafetensorError, OSError) as error:
        raise QloraError(
            f"{file}: cannot be read as safetensors ({error}); incomplete download?"
        ) from error
    found = {}
    try:
        # The package does not say where a tensor lies.
        content = parse_json(header)
        for name, (kind, shape) in about.items():
            begin, _ = needed(needed(content, name, Mapping), "data_offsets", list)
            found[name] = Stored(file, name, kind, shape, 8 + length + begin)
    except QloraError as error:
        raise QloraError(f"{file}: {error}") from error
    return found
