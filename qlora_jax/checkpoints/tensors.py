"""Where tensors are read from, one at a time: a folder of safetensors."""

import abc
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.names import Parameter
from qlora_jax.errors import QloraError, missing
from qlora_jax.quant import QuantizedArray

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Tensors(Protocol):
    """Named tensors on disk."""

    source: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of everything that is there, read from headers alone."""
        ...

    def not_floating(self) -> dict[str, str]:
        """Name -> type, as the format calls it, of every tensor that holds no floating numbers."""
        ...

    def name(self, parameter: Parameter, layer: int) -> str:
        """What this format calls one layer of a parameter."""
        ...

    def read(self, parameter: Parameter, layer: int) -> np.ndarray | QuantizedArray:
        """One layer of a parameter, axes and rows ordered as Hugging Face has them.

        Or, from files that hold it in 4 bits, these as they are, axes ordered as here.
        """
        ...

    def ignorable(self, name: str) -> bool:
        """Whether a tensor that belongs to no parameter may be passed over."""
        ...


class HuggingFaceNames(abc.ABC):
    """What tensors are called in any file of Hugging Face's."""

    @abc.abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As in `Tensors`."""

    def name(self, parameter: Parameter, layer: int) -> str:
        usual, *others = parameter.hf_names(layer)
        return next((name for name in others if name in self.shapes()), usual)

    def ignorable(self, name: str) -> bool:
        # Old files hold the rotary frequencies; a tied head may be stored although it is tied.
        return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


class SafetensorsFolder(HuggingFaceNames):
    """model.safetensors, or else the shards that model.safetensors.index.json lists.

    Raises QloraError if there is neither, if the index names a file outside the folder, one that is
    not there, or a tensor that its file lacks.
    """

    def __init__(self, folder: Path) -> None:
        self.source = str(folder)
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, str] = {}
        files = list_files(folder, SINGLE, INDEX)
        for file in files.present:
            with open_safetensors(file) as opened:
                _refuse_doubles(file)
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    if name in self._file_of:
                        raise QloraError(f"{name}: in {self._file_of[name]} and in {file}")
                    self._file_of[name] = file
                    header = opened.get_slice(name)
                    self._shapes[name] = tuple(header.get_shape())
                    self._types[name] = header.get_dtype()
        files.check(self._file_of)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def not_floating(self) -> dict[str, str]:
        # The others are I64, U8, BOOL and the like, and F8_E4M3 and its kin, which need scales.
        known = ("F64", "F32", "F16", "BF16")
        return {n: kind for n, kind in self._types.items() if kind not in known}

    def read(self, parameter: Parameter, layer: int) -> np.ndarray:
        name = self.name(parameter, layer)
        # Opened for each tensor, since an open file keeps every page that was read mapped.
        with open_safetensors(self._file_of[name]) as opened:
            return opened.get_tensor(name)


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """The file opened by the safetensors package; its complaints become QloraError."""
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise missing("safetensors", f"reading {file}", "hf") from error
    try:
        with safe_open(file, framework="np") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise QloraError(
            f"{file}: cannot be read as safetensors ({error}); incomplete download?"
        ) from error


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a checkpoint, and which tensor its index expects in which of them."""

    index: Path
    present: list[Path]
    listed: dict[str, Path]

    def check(self, found: Mapping[str, Path]) -> None:
        """Raises QloraError unless tensors were found where the index says that they are."""
        lost = [name for name, file in self.listed.items() if found.get(name) != file]
        if lost:
            raise QloraError(f"{self.index}: not in the files it names: {', '.join(sorted(lost))}")


def list_files(folder: Path, single: str, index: str) -> Files:
    """`single` alone, or else the shards that `index` lists; QloraError if there is neither."""
    # The order of transformers, which may leave the index of older shards beside a single file.
    if (folder / single).is_file():
        return Files(folder / index, [folder / single], {})
    if not (folder / index).is_file():
        raise QloraError(f"{folder}: neither {single} nor {index} is there")
    listed = _read_index(folder / index)
    return Files(folder / index, sorted(set(listed.values())), listed)


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor name -> file, every file checked to lie in the folder."""
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise QloraError(f"{index}: no 'weight_map' that says which file holds which tensor")
    folder = index.parent
    for file in sorted(set(map(str, weight_map.values()))):
        # A plain name cannot leave the folder, and shards never lie deeper.
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise QloraError(f"{index}: refusing {file!r}, which is not a file name in its folder")
        if not (folder / file).is_file():
            raise QloraError(f"{index}: names {file}, which is not there; incomplete download?")
    return {name: folder / str(file) for name, file in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; QloraError if it holds anything else."""
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise QloraError(f"{path} is not there") from error
    except NotADirectoryError as error:
        raise QloraError(f"{path} is not there, since {path.parent} is no folder") from error
    except IsADirectoryError as error:
        raise QloraError(f"{path} is a folder; expected a JSON file") from error
    except QloraError as error:
        raise QloraError(f"{path}: {error}") from error


def parse_json(text: bytes) -> dict[str, Any]:
    """The JSON object that a text is; QloraError if it is anything else."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise QloraError(f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise QloraError(f"expected a JSON object, found {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no name may stand twice: readers differ in which one counts."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise QloraError(f"the name {double!r} stands in it twice")
    return content


def _refuse_doubles(file: Path) -> None:
    """Raises QloraError for a safetensors file with two tensors of a name; it was opened before."""
    with file.open("rb") as opened:
        header = opened.read(int.from_bytes(opened.read(8), "little"))
    try:
        json.loads(header, object_pairs_hook=_unique)
    except QloraError as error:
        raise QloraError(f"{file}: {error}") from error


def fault_of(x: Any) -> str | None:
    """What keeps an array from being a weight, or None: its type, or numbers that are not finite.

    To be put after the tensor's name in an error.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"has the type {x.dtype}, expected floating-point numbers"
    if odd := _count_not_finite(x):
        return f"{odd} of {x.size} elements are not finite as {x.dtype}"
    return None


def _count_not_finite(x: Any) -> int:
    if not isinstance(x, np.ndarray):
        return int(_count_on_device(x))
    # Some rows at a time: the device would get a copy of the whole, the mask be half as large.
    rows = max(1, (1 << 22) * len(x) // max(x.size, 1)) if x.ndim else 1
    pieces = (x[at : at + rows] for at in range(0, len(x), rows)) if x.ndim else (x,)
    return sum(int(np.sum(~np.isfinite(piece))) for piece in pieces)


@jax.jit
def _count_on_device(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x))
