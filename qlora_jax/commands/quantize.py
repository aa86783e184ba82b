"""`qlora-jax quantize`: a 4-bit model on disk."""

import dataclasses
from pathlib import Path

import jax

from qlora_jax.checkpoints.folder import check_new
from qlora_jax.checkpoints.quantized import save_quantized
from qlora_jax.commands.options import ModelOptions
from qlora_jax.errors import QloraError
from qlora_jax.lora.tree import named_leaves
from qlora_jax.quant import QuantizedArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(ModelOptions):
    """Quantize a model once and write it, so that every later command loads it at once."""

    output: Path
    """Folder for the 4-bit model; give it as --model to the other commands."""

    def run(self) -> None:
        """Writes the folder, and prints what it holds. Raises QloraError if that is no 4 bits."""
        if self.quantization == "none":
            raise QloraError("--quantization none leaves nothing to write; choose nf4 or fp4")
        check_new(self.output)
        model = self.load()
        save_quantized(self.output, model)
        leaves = named_leaves(model.params)
        quantized = [x for x in leaves.values() if isinstance(x, QuantizedArray)]
        bits = 8 * sum(x.nbytes for x in quantized) / sum(x.size for x in quantized)
        rest = sum(x.nbytes for x in jax.tree.leaves(list(leaves.values()))) - sum(
            x.nbytes for x in quantized
        )
        print(
            f"{sum(x.size for x in quantized):,} weights in {bits:.3f} bits each, "
            f"{sum(x.nbytes for x in quantized) / 1e6:.0f} MB, and {rest / 1e6:.0f} MB that stay "
            f"dense, in {self.output}"
        )
