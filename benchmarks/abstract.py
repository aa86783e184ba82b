"""A whole LoRA train step over a 4-bit model, from shapes alone: nothing is allocated."""

from typing import Any

import jax.numpy as jnp

import qlora_jax as qj
from qlora_jax.models import LlamaConfig
from qlora_jax.models.remat import RematPolicy
from qlora_jax.plan import abstract
from qlora_jax.training.settings import TrainSettings


def config(layers: int, hidden: int = 1024, vocabulary: int = 32000) -> LlamaConfig:
    """A Llama of that many layers in Llama 2's proportions."""
    return LlamaConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 11 * hidden // 4,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
        }
    )


def train_step(
    config: LlamaConfig,
    *,
    batch: int,
    time: int,
    rank: int = 16,
    dtype: Any = jnp.float32,
    remat: RematPolicy = "full",
) -> tuple[Any, tuple[Any, Any, Any]]:
    """(step, (state, params, batch)): the jitted step, and shapes that it can be lowered for."""
    training = TrainSettings(batch_size=batch, remat=remat)
    step = abstract.train_step(config, time, qj.LoraConfig(rank=rank), training, qj.NF4(), dtype)
    return step.step, step.arguments
