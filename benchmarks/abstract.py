"""A whole LoRA train step over a 4-bit model, from shapes alone: nothing is allocated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import qlora_jax as qj
from qlora_jax import models
from qlora_jax.checkpoints.model import Model
from qlora_jax.models import LlamaConfig
from qlora_jax.models.remat import Remat


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
    remat: Remat = "full",
) -> tuple[Any, tuple[Any, Any, Any]]:
    """(step, (state, params, batch)): the jitted step, and shapes that it can be lowered for."""
    params = qj.quantize_tree(models.abstract_params(config, dtype), qj.NF4())
    model = Model(config=config, params=params, tokenizer=None, source="abstract", dtype=dtype)
    adapters = jax.eval_shape(
        lambda key: qj.lora.init(key, params, qj.LoraConfig(rank=rank)), jax.random.key(0)
    )
    optimizer = optax.adamw(2e-4)
    state = jax.eval_shape(lambda a: qj.TrainState.create(a, optimizer), adapters)
    loss = functools.partial(model.loss, remat=remat)
    step = qj.make_train_step(loss, optimizer, max_grad_norm=0.3)
    tokens = jax.ShapeDtypeStruct((batch, time), jnp.int32)
    return step, (
        state,
        params,
        {"input_ids": tokens, "labels": tokens, "attention_mask": tokens},
    )
