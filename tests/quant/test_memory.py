"""Quantizing a tensor takes little besides it: what a checkpoint's streaming import relies on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints import tensors
from qlora_jax.quant import NF4, array, nf4_matmul, pieces, quantize


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_temporaries_stay_near_one_more_tensor(dtype):
    x = jax.ShapeDtypeStruct((2048, 4096), dtype)
    compiled = jax.jit(lambda x: quantize(x, NF4())).lower(x).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= 1.25 * x.size * np.dtype(dtype).itemsize


@pytest.mark.parametrize("check", [array._all_usable, tensors._all_finite])
def test_looking_for_odd_numbers_takes_less_than_a_tensor(check):
    """Counting them would take four bytes for each element."""
    compiled = check.lower(jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 2048 * 4096


def test_a_large_weight_is_decoded_in_pieces(monkeypatch):
    """And those of a layer one after the other, in a gradient that computes the layer again."""
    width = 512
    weights = [quantize(jax.ShapeDtypeStruct((4, width, width), jnp.float32), NF4())] * 3

    def loss(x, weights):
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(x, layer):
            for w in layer:
                x = jnp.tanh(nf4_matmul(x, w))
            return x, None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    monkeypatch.setattr(pieces, "LIMIT", width * width // 8)
    x = jax.ShapeDtypeStruct((4, width), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(x, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * width * width
