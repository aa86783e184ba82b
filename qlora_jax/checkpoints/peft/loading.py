"""Reading a folder of PEFT's."""

from pathlib import Path

import numpy as np

from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.checkpoints.json_files import read_json
from qlora_jax.checkpoints.names import parameters
from qlora_jax.checkpoints.peft.description import (
    CONFIG,
    OLD_WEIGHTS,
    PREFIX,
    WEIGHTS,
    check_supported,
    texts,
)
from qlora_jax.checkpoints.peft.experts import split_experts
from qlora_jax.checkpoints.peft.read_lora import LoraReading
from qlora_jax.checkpoints.peft.read_vera import VeraReading
from qlora_jax.checkpoints.peft.tied import check_tied, tied_head
from qlora_jax.checkpoints.safetensors_files import read_header
from qlora_jax.checkpoints.torch_files import load_tensors, to_numpy
from qlora_jax.errors import QloraError
from qlora_jax.lora import Adapters, LoraConfig, VeraConfig
from qlora_jax.models import family_of


def load(folder: str | Path, model: AnyModel) -> tuple[Adapters, LoraConfig | VeraConfig]:
    """(adapters, configuration) of PEFT's in `folder`, to be attached to `model.params`.

    Of LoRA and DoRA, where ranks that differ among the layers are padded with zeros, which stay
    zero in training, and experts may have an adapter each or, by PEFT's target_parameters, one for
    all of a layer; and of VeRA, whose matrices are drawn again where the file leaves them out.
    Raises QloraError for what is neither, for a variant that is not supported, and, listing them
    all, for tensors that do not fit the model, are not finite, or are not those that
    adapter_config.json names (target_modules, layers_to_transform, modules_to_save).
    """
    folder = Path(folder).expanduser()
    about = read_json(folder / CONFIG)
    conv1d = bool(family_of(model.config).as_stored)
    check_supported(about, folder / CONFIG, conv1d=conv1d)
    # Copies: an adapter is small, and may be saved again to where it lies.
    tensors = {name: np.array(x) for name, x in _read_tensors(folder).items()}
    if about.get("ensure_weight_tying"):
        for name, x in tied_head(tensors, model).items():
            if name in tensors and np.array_equal(tensors[name], x):
                del tensors[name]
    if texts(about, "target_parameters"):
        table = {parameter.path: parameter for parameter in parameters(model.config)}
        try:
            tensors, about = split_experts(tensors, about, table)
        except QloraError as error:
            raise QloraError(f"{folder}: {error}") from error
    reading = (VeraReading if about["peft_type"] == "VERA" else LoraReading)(about, model)
    for name, x in sorted(tensors.items()):
        reading.take(name.removeprefix(PREFIX), x)
    reading.finish(folder)
    check_tied(reading.adapters, model)
    try:
        return reading.adapters, reading.config()
    except QloraError as error:
        raise QloraError(f"{folder / CONFIG}: {error}") from error


def tensor_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors of PEFT's adapter in `folder`, by the names that they have there."""
    return {name: x.shape for name, x in _read_tensors(Path(folder)).items()}


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    if (folder / WEIGHTS).is_file():
        return {name: stored.read() for name, stored in read_header(folder / WEIGHTS).items()}
    if not (folder / OLD_WEIGHTS).is_file():
        raise QloraError(f"{folder}: neither {WEIGHTS} nor {OLD_WEIGHTS} is there")
    return {name: to_numpy(x) for name, x in load_tensors(folder / OLD_WEIGHTS).items()}
