"""bitsandbytes over NumPy arrays: a weight [N, K] in, its stored tensors out."""

from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import torch


def to_torch(x: np.ndarray) -> torch.Tensor:
    """A copy as a tensor of the same type; bfloat16 goes over by its bits."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(x).copy())


def from_torch(x: torch.Tensor) -> np.ndarray:
    """The inverse; bfloat16 becomes float32, which holds it exactly."""
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def quantize(
    weight: np.ndarray, codebook: str, block_size: int, *, double_quant: bool
) -> dict[str, Any]:
    """The stored tensors under their names on disk, and `dense`, the dequantized weight."""
    packed, state = bnb.quantize_4bit(
        to_torch(weight),
        blocksize=block_size,
        quant_type=codebook,
        compress_statistics=double_quant,
    )
    stored = {"packed": packed.numpy().reshape(-1), "absmax": state.absmax.numpy()}
    if double_quant:
        stored |= {
            "nested_absmax": state.state2.absmax.numpy(),
            "nested_offset": state.offset.numpy(),
            "nested_quant_map": state.state2.code.numpy(),
        }
    return stored | {"dense": from_torch(bnb.dequantize_4bit(packed, state))}
