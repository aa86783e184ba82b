"""Where tensors are read from, one at a time: a folder of safetensors."""

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.json_files import read_json
from qlora_jax.checkpoints.names import Parameter
from qlora_jax.checkpoints.safetensors_files import FLOATING, Stored, read_header
from qlora_jax.errors import QloraError
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
        """One layer of a parameter, axes and rows ordered as Hugging Face has them; it may be the
        mapped file itself, which cannot be written to and changes with it.

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
        self._stored: dict[str, Stored] = {}
        files = list_files(folder, SINGLE, INDEX)
        for file in files.present:
            for name, stored in read_header(file).items():
                if name in self._stored:
                    raise QloraError(f"{name}: in {self._stored[name].file} and in {file}")
                self._stored[name] = stored
        files.check({name: stored.file for name, stored in self._stored.items()})
        self._shapes = {name: stored.shape for name, stored in self._stored.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def not_floating(self) -> dict[str, str]:
        # The others are I64, U8, BOOL and the like, and F8_E4M3 and its kin, which need scales.
        kinds = {name: stored.kind for name, stored in self._stored.items()}
        return {name: kind for name, kind in kinds.items() if kind not in FLOATING}

    def read(self, parameter: Parameter, layer: int) -> np.ndarray:
        return self._stored[self.name(parameter, layer)].read()


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
        return 0 if _all_finite(x) else int(_count_on_device(x))
    # Some rows at a time: the device would get a copy of the whole, the mask be half as large.
    rows = max(1, (1 << 22) * len(x) // max(x.size, 1)) if x.ndim else 1
    pieces = (x[at : at + rows] for at in range(0, len(x), rows)) if x.ndim else (x,)
    return sum(int(np.sum(~np.isfinite(piece))) for piece in pieces)


# Asked before counting, for which XLA on a CPU keeps four bytes for each element instead of one. (A
# maximum would take none, but loses a NaN there.)
@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


@jax.jit
def _count_on_device(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x))
