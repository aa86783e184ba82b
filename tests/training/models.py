"""A random Llama small enough to train in a test."""

import functools

import jax
import numpy as np

import qlora_jax as qj
from qlora_jax import models
from qlora_jax.data import TokenizedDataset, TokenizedExample
from qlora_jax.models import LlamaConfig


@functools.cache
def model() -> qj.Model:
    config = LlamaConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "max_position_embeddings": 64,
            "eos_token_id": 1,
        }
    )
    params = qj.quantize_tree(models.init_params(config, jax.random.key(0)), qj.NF4())
    return qj.Model(config, params, None, "tiny", np.float32)


def dataset(count: int = 12, seed: int = 0) -> TokenizedDataset:
    """Token t is followed by t + 1: learned in a few steps. The first two labels are left out."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        ids = (rng.integers(2, 40) + np.arange(rng.integers(6, 20))).astype(np.int32)
        labels = np.where(np.arange(len(ids)) < 2, -100, ids).astype(np.int32)
        examples.append(TokenizedExample(ids, labels))
    return TokenizedDataset(tuple(examples), pad_id=0)
