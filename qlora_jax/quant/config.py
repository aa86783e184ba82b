"""What a person chooses about quantization."""

import dataclasses
from typing import Literal

import numpy as np

from qlora_jax.errors import QloraError
from qlora_jax.quant import codebooks

CodebookName = Literal["nf4", "fp4"]


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """A 4-bit format: code book, block size along K, and whether the scales are quantized too.

    block_size: a power of two from 32 to 4096. double_quant: store each block's absmax in 8 bits
    (QLoRA section 3), which takes 4.5 bits per weight down to 4.127 at block size 64.
    """

    codebook: CodebookName
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        b = self.block_size
        if not (32 <= b <= 4096 and b & (b - 1) == 0):
            raise QloraError(f"block_size must be a power of two from 32 to 4096, got {b}")
        levels(self.codebook)


def NF4(block_size: int = 64, double_quant: bool = True) -> QuantConfig:  # noqa: N802 (the format's name)
    """4-bit NormalFloat, the format of QLoRA (arXiv:2305.14314, section 3)."""
    return QuantConfig("nf4", block_size, double_quant)


def FP4(block_size: int = 64, double_quant: bool = True) -> QuantConfig:  # noqa: N802
    """4-bit floating point (E2M1), the other format that bitsandbytes writes."""
    return QuantConfig("fp4", block_size, double_quant)


def levels(codebook: CodebookName) -> np.ndarray:
    """The 16 values of a named code book by code, fp32 [16]."""
    if codebook == "nf4":
        return codebooks.nf4()
    if codebook == "fp4":
        return codebooks.fp4()
    raise QloraError(f"unknown code book {codebook!r}; known: 'nf4', 'fp4'")
