"""Plain Flax models. They know nothing of quantization or LoRA; `qlora_jax.lift` adds both."""

from qlora_jax.models.cache import Cache, EncoderDecoderCache
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
from qlora_jax.models.phi3 import Phi3Config
from qlora_jax.models.rope import RopeConfig
from qlora_jax.models.smollm3 import SmolLM3Config
from qlora_jax.models.t5_config import T5Config

__all__ = [
    "FAMILIES",
    "Cache",
    "DecoderConfig",
    "EncoderDecoderCache",
    "Family",
    "LlamaConfig",
    "Phi3Config",
    "RopeConfig",
    "SmolLM3Config",
    "T5Config",
    "abstract_params",
    "apply",
    "apply_head",
    "apply_hidden",
    "bind",
    "family_of",
    "init_params",
    "read_config",
]
