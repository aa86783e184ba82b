"""QLoRA in JAX: frozen 4-bit base weights, low-rank adapters, any Flax model or function."""

from qlora_jax import lora
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.encoder import EncoderModel
from qlora_jax.checkpoints.load import load
from qlora_jax.checkpoints.model import Model
from qlora_jax.errors import QloraError
from qlora_jax.lift import lift
from qlora_jax.lora import LoraArray, LoraConfig, VeraConfig
from qlora_jax.models.attention import use_attention
from qlora_jax.parallel import Layout, make_mesh
from qlora_jax.quant import (
    FP4,
    NF4,
    Policy,
    QuantizedArray,
    backends,
    quantize,
    quantize_tree,
    use_implementation,
)
from qlora_jax.training.adamw8bit import adamw8bit
from qlora_jax.training.lora_plus import lora_plus
from qlora_jax.training.masks import combine, freeze_base, partition, trainable_mask
from qlora_jax.training.paged import paged
from qlora_jax.training.step import TrainState, make_eval_step, make_train_step

__all__ = [
    "FP4",
    "NF4",
    "EncoderModel",
    "Layout",
    "LoraArray",
    "LoraConfig",
    "Model",
    "Policy",
    "QloraError",
    "QuantizedArray",
    "TrainState",
    "VeraConfig",
    "adamw8bit",
    "backends",
    "combine",
    "freeze_base",
    "lift",
    "load",
    "lora",
    "lora_plus",
    "make_eval_step",
    "make_mesh",
    "make_train_step",
    "paged",
    "partition",
    "peft",
    "quantize",
    "quantize_tree",
    "trainable_mask",
    "use_attention",
    "use_implementation",
]
