"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, both ways."""

from qlora_jax.checkpoints.peft.description import CONFIG, WEIGHTS
from qlora_jax.checkpoints.peft.loading import load, tensor_shapes
from qlora_jax.checkpoints.peft.writing import check, save

__all__ = ["CONFIG", "WEIGHTS", "check", "load", "save", "tensor_shapes"]
