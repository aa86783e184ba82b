"""Plain Flax models. They know nothing of quantization or LoRA; `qlora_jax.lift` adds both."""

from qlora_jax.models.cache import Cache
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.families import (
    FAMILIES,
    Family,
    abstract_params,
    apply,
    apply_head,
    apply_hidden,
    bind,
    family_of,
    init_params,
    read_config,
)
from qlora_jax.models.llama import LlamaConfig
from qlora_jax.models.rope import RopeConfig

__all__ = [
    "FAMILIES",
    "Cache",
    "DecoderConfig",
    "Family",
    "LlamaConfig",
    "RopeConfig",
    "abstract_params",
    "apply",
    "apply_head",
    "apply_hidden",
    "bind",
    "family_of",
    "init_params",
    "read_config",
]
