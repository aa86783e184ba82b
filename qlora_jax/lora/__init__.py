"""Low-rank adapters: configuration, initialization, attaching to a parameter tree, merging."""

from qlora_jax.lora.adapters import Adapters, attach, count, init
from qlora_jax.lora.array import LoraArray, LoraWeights
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.merge import merge, merge_errors, unmerge

__all__ = [
    "Adapters",
    "LoraArray",
    "LoraConfig",
    "LoraWeights",
    "attach",
    "count",
    "init",
    "merge",
    "merge_errors",
    "unmerge",
]
