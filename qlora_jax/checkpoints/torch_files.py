"""Checkpoints that torch.save wrote (`.bin`): pickles, of which nothing but tensors is read."""

import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.names import Parameter
from qlora_jax.checkpoints.tensors import HuggingFaceNames, list_files
from qlora_jax.errors import QloraError, missing, reason

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


class TorchFolder(HuggingFaceNames):
    """pytorch_model.bin, or else the shards that pytorch_model.bin.index.json lists.

    Read by torch, which must be installed, as weights only, so that nothing in the file is run.
    Files of PyTorch 1.6 and later stay on disk and are mapped into memory; older ones are read as a
    whole. Raises QloraError if there is neither file, as SafetensorsFolder does for its index, and
    for a file that holds anything but named tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.source = str(folder)
        self._tensors: dict[str, Any] = {}
        files = list_files(folder, SINGLE, INDEX)
        found = {}
        for file in files.present:
            tensors = load_tensors(file)
            self._tensors |= tensors
            found |= dict.fromkeys(tensors, file)
        files.check(found)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(x.shape) for name, x in self._tensors.items()}

    def not_floating(self) -> dict[str, str]:
        kinds = self._tensors.items()
        return {name: str(x.dtype) for name, x in kinds if not x.dtype.is_floating_point}

    def read(self, parameter: Parameter, layer: int) -> np.ndarray:
        return to_numpy(self._tensors[self.name(parameter, layer)])


def load_tensors(file: Path) -> dict[str, Any]:
    """Name -> torch tensor; QloraError without torch, or if the file holds anything else."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise missing("torch", f"reading {file}", "torch") from error
    try:
        # Before PyTorch 1.6 the format was no archive, and cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    # What torch raises for a damaged file depends on where the damage is.
    except Exception as error:
        raise QloraError(
            f"{file}: cannot be read as tensors that torch.save wrote ({reason(error)}); "
            "incomplete download?"
        ) from error
    if not isinstance(content, dict):
        raise QloraError(f"{file}: expected named tensors, found a {type(content).__name__}")
    strange = [
        str(name)
        for name, x in content.items()
        if not (isinstance(name, str) and isinstance(x, torch.Tensor) and x.layout == torch.strided)
    ]
    if strange:
        raise QloraError(f"{file}: no dense tensors: {', '.join(strange)}")
    return content


def to_numpy(x: Any) -> np.ndarray:
    """A torch tensor's numbers, where they lie; bfloat16, which NumPy lacks, by its bits."""
    import torch  # pyright: ignore[reportMissingImports]

    x = x.detach()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(jnp.bfloat16)
    return x.numpy()
