"""What bitsandbytes writes beside a packed weight: its `quant_state`, and its other tensors."""

import dataclasses
import json
from typing import Any

import numpy as np

from qlora_jax.checkpoints.json_files import parse_json
from qlora_jax.errors import QloraError
from qlora_jax.models.typed import checked, needed
from qlora_jax.quant import QuantConfig, codebooks
from qlora_jax.quant.blockwise import NESTED_BLOCK
from qlora_jax.quant.config import levels

_DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class QuantState:
    """One packed weight: its 4-bit format, and of the PyTorch weight [N, K] the shape and type.

    offset: the mean of the scales, where these are double-quantized.
    """

    format: QuantConfig
    shape: tuple[int, int]
    dtype: str
    offset: float | None

    @property
    def key(self) -> str:
        """The suffix of the tensor that holds `to_bytes`."""
        return f"quant_state.bitsandbytes__{self.format.codebook}"

    @property
    def whole_blocks(self) -> bool:
        """Whether no block runs from one row on into the next."""
        return self.shape[1] % self.format.block_size == 0

    def parts(self) -> dict[str, tuple[str, int]]:
        """Suffix -> (safetensors' type, size) of the tensors that stand beside the packed one."""
        blocks = -(-self.shape[0] * self.shape[1] // self.format.block_size)
        if not self.format.double_quant:
            return {"absmax": ("F32", blocks), "quant_map": ("F32", 16)}
        return {
            "absmax": ("U8", blocks),
            "nested_absmax": ("F32", -(-blocks // NESTED_BLOCK)),
            "nested_quant_map": ("F32", 256),
            "quant_map": ("F32", 16),
        }

    def tables(self) -> dict[str, np.ndarray]:
        """Suffix -> what codes stand for, to the bit as bitsandbytes writes it."""
        # Adding zero takes the sign off FP4's second zero, which has none in files.
        tables = {"quant_map": levels(self.format.codebook) + np.float32(0)}
        if self.format.double_quant:
            tables["nested_quant_map"] = codebooks.dynamic_8bit()
        return tables

    def to_bytes(self) -> np.ndarray:
        """The JSON, with keys and spaces as bitsandbytes has them, uint8."""
        content = {
            "quant_type": self.format.codebook,
            "blocksize": self.format.block_size,
            "dtype": self.dtype,
            "shape": self.shape,
        }
        if self.offset is not None:
            content |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": self.offset,
            }
        return np.frombuffer(json.dumps(content).encode(), np.uint8)

    @classmethod
    def from_bytes(cls, raw: np.ndarray) -> "QuantState":
        """The inverse; QloraError for anything that bitsandbytes would not write."""
        content = parse_json(raw.tobytes())
        codebook: Any = needed(content, "quant_type", str)  # which QuantConfig checks
        shape = [checked("shape", size, int) for size in needed(content, "shape", list)]
        if len(shape) != 2 or min(shape) < 1:
            raise QloraError(f"shape is {shape}, expected two sizes")
        dtype = needed(content, "dtype", str)
        if dtype not in _DTYPES:
            raise QloraError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
        nested = {key: content[key] for key in content if key.startswith("nested_")}
        offset = None
        if nested:
            offset = needed(nested, "nested_offset", float)
            if abs(offset) > float(np.finfo(np.float32).max):
                raise QloraError(f"nested_offset is {offset}, expected a number of float32")
            if (nested.get("nested_blocksize"), nested.get("nested_dtype")) != (256, "float32"):
                raise QloraError(f"{nested}: only blocks of 256 scales in float32 are supported")
        form = QuantConfig(codebook, needed(content, "blocksize", int), bool(nested))
        return cls(form, (shape[0], shape[1]), dtype, offset)
