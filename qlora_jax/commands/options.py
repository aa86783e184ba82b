"""Settings that several commands share."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from qlora_jax import lora
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.checkpoints.load import is_four_bit, load
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.names import Place
from qlora_jax.checkpoints.quantized import is_quantized_folder, stored_format
from qlora_jax.errors import QloraError
from qlora_jax.quant import NF4, QuantConfig

Format = Literal["auto", "nf4", "fp4", "none"]
DType = Literal["auto", "float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and in what form it is held in memory."""

    model: str
    """A checkpoint folder, a .gguf file, or a model's name on the Hugging Face hub."""
    quantization: Format = "auto"
    """Format of the frozen weights; auto: nf4, or what a folder written by `quantize` has."""
    block_size: int | None = None
    """Weights that share a scale, a power of two from 32 to 4096; None: 64, or what a folder
    written by `quantize` has."""
    double_quant: bool = True
    """Store the scales in 8 bits; a folder that `quantize` wrote without keeps its own."""
    dtype: DType = "auto"
    """Type of the computation; auto: float32 on CPU, bfloat16 elsewhere."""

    def load(self, *, dense: bool = False, place: Place | None = None, **head: Any) -> Any:
        """The model, loaded. dense: not quantized yet; place, and head, which is of an encoder: as
        `load` takes them."""
        dtype = None if self.dtype == "auto" else self.dtype
        format = None if dense else self.format()
        return load(self.model, quantization=format, dtype=dtype, place=place, **head)

    def format(self) -> QuantConfig | None:
        """What `load` is to quantize to. Of a checkpoint in 4 bits it is None, to keep them, or, if
        something is asked for, the format with that put in, so that `load` refuses any other.
        Raises QloraError for --quantization none on such a checkpoint."""
        folder = Path(self.model).expanduser()
        quantized, four_bit = is_quantized_folder(folder), is_four_bit(self.model)
        asked = self.quantization != "auto" or self.block_size is not None or not self.double_quant
        if four_bit and not asked:
            return None
        if self.quantization == "none":
            if four_bit:
                raise QloraError(
                    f"{self.model}: its weights are in 4 bits, so --quantization none cannot be; "
                    "give the checkpoint that it was made of as --model"
                )
            return None
        usual = stored_format(folder) if quantized else NF4()
        return QuantConfig(
            usual.codebook if self.quantization == "auto" else self.quantization,
            usual.block_size if self.block_size is None else self.block_size,
            # That scales are in 8 bits is the default, and no demand.
            usual.double_quant and self.double_quant,
        )

    def format_words(self) -> str:
        """The options by which another command holds the weights alike; "" or beginning with a
        space."""
        words = {
            f" --quantization {self.quantization}": self.quantization != "auto",
            f" --block-size {self.block_size}": self.block_size is not None,
            " --no-double-quant": not self.double_quant,
        }
        return "".join(word for word, said in words.items() if said)


def with_adapter(model: Model, adapter: Path | None) -> Any:
    """The model's parameters, with the PEFT adapter in a folder attached."""
    if adapter is None:
        return model.params
    return lora.attach(model.params, peft.load(adapter, model)[0])


def need_tokenizer(model: AnyModel) -> None:
    """Raises QloraError if the model has none: text then means nothing to it."""
    if model.tokenizer is None:
        raise QloraError(
            f"{model.source} has no tokenizer, so text cannot be trained on or generated; put "
            "tokenizer.json and tokenizer_config.json beside the weights"
        )


def program() -> str:
    """What starts this program again: `qlora-jax` where PATH has it, else as it was called."""
    called = Path(sys.argv[0]).absolute()
    found = shutil.which("qlora-jax")
    # Under `python -m` and in a notebook it was no program of ours that was called.
    if called.name != "qlora-jax" or not called.exists():
        return "qlora-jax"
    if found and os.path.samefile(found, called):
        return "qlora-jax"
    here = Path.cwd()
    return str(called.relative_to(here) if called.is_relative_to(here) else called)
