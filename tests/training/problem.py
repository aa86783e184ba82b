"""A tiny random Llama over a 4-bit base, and data that it can learn."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import lora, models
from qlora_jax.checkpoints.model import Model
from qlora_jax.data import IGNORE, TokenizedDataset, TokenizedExample
from qlora_jax.models import LlamaConfig
from qlora_jax.quant import NF4, Policy, quantize_tree

VOCABULARY = 64
CONFIG = LlamaConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
)
LORA = lora.LoraConfig(rank=4, alpha=8.0)


def make_model(seed: int = 0) -> Model:
    params = models.init_params(CONFIG, jax.random.key(seed))
    # The default initialization is so small that the layers would hardly count.
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
    params = quantize_tree(params, NF4(), Policy())
    return Model(CONFIG, params, tokenizer=None, source="tiny", dtype=jnp.float32)


def make_adapters(model: Model, seed: int = 1) -> lora.Adapters:
    """With B not zero, so that every gradient counts."""
    adapters = lora.init(jax.random.key(seed), model.params, LORA)
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def make_batch(rows: int, length: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Random ids; rows differ in their numbers of real and of labelled tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCABULARY, (rows, length)).astype(np.int32)
    place = np.arange(length)
    real = place < rng.integers(length // 2, length + 1, (rows, 1))
    answer = real & (place >= rng.integers(1, length // 2, (rows, 1)))
    return {
        "input_ids": np.where(real, ids, 0).astype(np.int32),
        "labels": np.where(answer, ids, IGNORE).astype(np.int32),
        "attention_mask": real.astype(np.int32),
    }


def make_dataset(count: int, seed: int = 0, **options: Any) -> TokenizedDataset:
    """Every token is followed by the same one: quickly learnt."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        size = int(rng.integers(6, 13))
        ids = ((rng.integers(VOCABULARY) + 3 * np.arange(size)) % VOCABULARY).astype(np.int32)
        labels = np.where(np.arange(size) < 2, IGNORE, ids).astype(np.int32)
        examples.append(TokenizedExample(ids, labels))
    return TokenizedDataset(tuple(examples), pad_id=0, **options)
