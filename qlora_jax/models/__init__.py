"""Plain Flax models. They know nothing of quantization or LoRA; `qlora_jax.lift` adds both."""

from qlora_jax.models.cache import Cache
from qlora_jax.models.config import LlamaConfig, RopeConfig

__all__ = ["Cache", "LlamaConfig", "RopeConfig"]
