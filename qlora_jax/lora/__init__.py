"""Adapters: configuration, initialization, attaching to a parameter tree, merging."""

from qlora_jax.lora.adapters import Adapters, attach, count, init, trained_mask
from qlora_jax.lora.array import AdaptedArray, LoraArray, LoraWeights
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.decompose import init_quantized
from qlora_jax.lora.merge import merge, merge_errors, unmerge
from qlora_jax.lora.vera import VeraArray, VeraConfig, VeraProjections, VeraWeights

__all__ = [
    "AdaptedArray",
    "Adapters",
    "LoraArray",
    "LoraConfig",
    "LoraWeights",
    "VeraArray",
    "VeraConfig",
    "VeraProjections",
    "VeraWeights",
    "attach",
    "count",
    "init",
    "init_quantized",
    "merge",
    "merge_errors",
    "trained_mask",
    "unmerge",
]
