"""Activation functions by the names that config.json has for them."""

import functools
from collections.abc import Callable, Mapping

import jax

from qlora_jax.errors import QloraError

_TANH = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _TANH,
    "gelu_pytorch_tanh": _TANH,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
"""What transformers computes under each name; gelu is the exact one, by erf."""


def check_activation(key: str, name: str) -> str:
    """`name`, if it is known. Raises QloraError that says which entry of config.json, `key`, is."""
    if name not in ACTIVATIONS:
        raise QloraError(f"{key} {name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return name
