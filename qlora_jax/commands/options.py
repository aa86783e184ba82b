"""Settings that several commands share."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from qlora_jax import lora
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.load import load
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.quantized import is_quantized_folder
from qlora_jax.quant import FP4, NF4, QuantConfig

Format = Literal["auto", "nf4", "fp4", "none"]
DType = Literal["auto", "float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and in what form it is held in memory."""

    model: str
    """A checkpoint folder, a .gguf file, or a model's name on the Hugging Face hub."""
    quantization: Format = "auto"
    """Format of the frozen weights; auto: nf4, unless the folder was written by `quantize`."""
    block_size: int = 64
    """Weights that share a scale: a power of two from 32 to 4096."""
    double_quant: bool = True
    """Store the scales in 8 bits."""
    dtype: DType = "auto"
    """Type of the computation; auto: float32 on CPU, bfloat16 elsewhere."""

    def load(self) -> Model:
        """The model, loaded."""
        dtype = None if self.dtype == "auto" else self.dtype
        return load(self.model, quantization=self.format(), dtype=dtype)

    def format(self) -> QuantConfig | None:
        """What `load` is to quantize to."""
        if self.quantization == "none":
            return None
        if self.quantization == "auto" and is_quantized_folder(Path(self.model)):
            return None
        make = FP4 if self.quantization == "fp4" else NF4
        return make(self.block_size, self.double_quant)


def with_adapter(model: Model, adapter: Path | None) -> Any:
    """The model's parameters, with the PEFT adapter in a folder attached."""
    if adapter is None:
        return model.params
    return lora.attach(model.params, peft.load(adapter, model)[0])
