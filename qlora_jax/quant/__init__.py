"""4-bit block-wise quantization: code books, rounding, QuantizedArray, and what is quantized."""

from qlora_jax.quant.array import QuantizedArray, quantize
from qlora_jax.quant.config import FP4, NF4, QuantConfig
from qlora_jax.quant.implementations import backends, use_implementation
from qlora_jax.quant.matmul import nf4_matmul, nf4_matmul_transposed
from qlora_jax.quant.policy import Policy, dequantize_tree, is_quantized, path_str, quantize_tree

__all__ = [
    "FP4",
    "NF4",
    "Policy",
    "QuantConfig",
    "QuantizedArray",
    "backends",
    "dequantize_tree",
    "is_quantized",
    "nf4_matmul",
    "nf4_matmul_transposed",
    "path_str",
    "quantize",
    "quantize_tree",
    "use_implementation",
]
