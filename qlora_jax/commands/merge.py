"""`qlora-jax merge`: an adapter and its base as one dense checkpoint."""

import dataclasses
import statistics
from pathlib import Path
from typing import Literal

from qlora_jax import lora
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.export import save_pretrained
from qlora_jax.checkpoints.folder import check_new
from qlora_jax.checkpoints.load import is_four_bit, load
from qlora_jax.commands.classes import head_of, with_labels
from qlora_jax.commands.options import ModelOptions
from qlora_jax.errors import QloraError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(ModelOptions):
    """Add an adapter into its base model and write a dense Hugging Face checkpoint."""

    adapter: Path
    """Folder of the PEFT adapter. Give --quantization, --block-size and --double-quant as in its
    training."""
    output: Path
    """Folder for the checkpoint; must not exist, or be empty."""
    into: Literal["dequantized", "original"] = "dequantized"
    """The base: the 4-bit weights that training saw, or the checkpoint's own, unquantized ones."""
    save_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights written."""

    def run(self) -> None:
        """Writes the checkpoint, and prints how far its weights are from the trained ones.

        Raises QloraError for --into original with a checkpoint in 4 bits.
        """
        if self.into == "original" and is_four_bit(self.model):
            raise QloraError(
                f"{self.model}: the original weights are not in this checkpoint, only 4-bit ones; "
                "give the one that it was made of as --model, or leave out --into original"
            )
        check_new(self.output)
        head = head_of(self.adapter)
        model = self.load(**head)
        adapters, _ = peft.load(self.adapter, model)
        base, original = model, None
        if self.into == "original":
            base = load(self.model, dtype="float32", **head)
            original = base.params
        errors = lora.merge_errors(model.params, adapters, self.save_dtype, original)
        base = with_labels(base, self.adapter)
        save_pretrained(
            self.output, base, lora.attach(base.params, adapters), dtype=self.save_dtype
        )
        worst = max(errors, key=errors.__getitem__)
        print(f"merged checkpoint in {self.output}")
        print(
            f"weights differ from what was trained by {statistics.median(errors.values()):.2e} "
            f"(median, relative), at most {errors[worst]:.2e} ({worst})"
        )
