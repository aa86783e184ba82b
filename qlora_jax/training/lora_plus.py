"""LoRA+ (arXiv:2402.12354): a higher learning rate for B than for A."""

import dataclasses
from typing import Any

import jax
import optax

from qlora_jax.errors import QloraError
from qlora_jax.lora import Adapters, LoraWeights, VeraWeights
from qlora_jax.quant import path_str


def lora_plus(
    optimizer: optax.GradientTransformation, ratio: float
) -> optax.GradientTransformation:
    """`optimizer` of adapters with the learning rate of every B, and of vectors, times `ratio`.

    For any optimizer whose updates are proportional to its learning rate, AdamW's decay of weights
    included. Raises QloraError for a ratio that is not positive.
    """
    if not 0 < ratio < float("inf"):
        raise QloraError(f"the ratio of learning rates must be positive and finite, got {ratio}")

    def fast(adapters: Adapters) -> Any:
        return jax.tree.map(lambda label: label == "b", adapter_labels(adapters))

    return optax.chain(optimizer, optax.masked(optax.scale(ratio), fast))


def adapter_labels(adapters: Adapters) -> Any:
    """A label for each array of adapters, as optax.multi_transform takes them.

    "embedding"  A and B of an embedding's adapter, where neither plays its usual part
    "b"          every other B, and, as in PEFT, all vectors: magnitudes, VeRA's, biases and scales
    "a"          the rest: A, and matrices trained in full
    """

    def one(path: Any, adapter: Any) -> Any:
        name = path_str(path).rpartition("/")[2]
        if isinstance(adapter, LoraWeights):
            labels = jax.tree.map(lambda _: "b", adapter)
            if name == "embedding":
                return jax.tree.map(lambda _: "embedding", adapter)
            return dataclasses.replace(labels, a="a")
        matrix = name in ("kernel", "embedding") and not isinstance(adapter, VeraWeights)
        return jax.tree.map(lambda _: "a" if matrix else "b", adapter)

    return jax.tree_util.tree_map_with_path(
        one, adapters, is_leaf=lambda x: isinstance(x, LoraWeights | VeraWeights)
    )
