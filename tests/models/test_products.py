"""Dense fp32 products in pieces: the same product, with less rounding, on a CPU only."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax import models
from qlora_jax.checkpoints.model import Model
from qlora_jax.models.products import TERMS, in_pieces

WIDTH = 2 * TERMS + 25


def product(x, weight):
    return in_pieces(x, weight, (((x.ndim - 1,), (0,)), ((), ())), precision=None)


def contracted(*arguments, function=product, platform="cpu"):
    """How many terms each product of a matrix in the program for a platform adds."""
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    operands = re.findall(r"stablehlo.dot_general.*: \(tensor<([0-9x]+)x\w+>", program)
    return [int(shape.split("x")[-1]) for shape in operands]


def test_no_sum_is_longer_than_a_piece():
    x, weight = jnp.zeros((2, 3, WIDTH)), jnp.zeros((WIDTH, 5))
    assert contracted(x, weight) == [WIDTH - 2 * TERMS, TERMS]  # the second in a loop
    assert contracted(x[..., : 2 * TERMS], weight[: 2 * TERMS]) == [TERMS, TERMS]
    assert contracted(x[..., :TERMS], weight[:TERMS]) == [TERMS]


def test_other_devices_and_types_multiply_at_once():
    x, weight = jnp.zeros((2, WIDTH)), jnp.zeros((WIDTH, 5))
    assert contracted(x, weight, platform="cuda") == [WIDTH]
    assert contracted(x, weight, platform="tpu") == [WIDTH]
    assert contracted(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)) == [WIDTH]


@pytest.mark.parametrize("rows", [1, 40])
def test_terms_behind_a_large_one(rows):
    """Next to 2^25 a sum loses ones; those of the other pieces are all there."""
    x = np.ones((rows, 2 * TERMS), np.float32)
    x[:, 0] = 2.0**25
    found = np.asarray(jax.jit(product)(x, np.ones((2 * TERMS, 3), np.float32)))
    assert found.min() >= 2**25 + TERMS


@pytest.mark.parametrize("width", [TERMS + 1, 2 * TERMS, WIDTH, 4 * TERMS - 1])
def test_values_and_gradients(width):
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = jax.random.normal(keys[0], (2, 3, width)), jax.random.normal(keys[1], (width, 5))
    g = jax.random.normal(keys[2], (2, 3, 5))
    wide = [np.asarray(array, np.float64) for array in (x, weight, g)]
    found, back = jax.vjp(jax.jit(product), x, weight)
    np.testing.assert_allclose(found, wide[0] @ wide[1], rtol=0, atol=1e-4)
    d_x, d_weight = back(g)
    np.testing.assert_allclose(d_x, wide[2] @ wide[1].T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        d_weight, np.einsum("btk,btn->kn", wide[0], wide[2]), rtol=0, atol=1e-5
    )


def test_models_whose_weights_are_arrays():
    """The layers of a dense decoder; those with 4-bit weights or adapters are as they were."""
    sizes = {"hidden_size": 32, "intermediate_size": WIDTH, "num_hidden_layers": 2}
    config = models.read_config(
        {"model_type": "llama", "vocab_size": 50, "num_attention_heads": 4, **sizes}
    )
    dense = models.init_params(config, jax.random.key(0))
    model = Model(config, dense, None, "random", jnp.float32)
    ids = jnp.asarray([[1, 2, 3]])

    def logits(params, ids):
        return model.apply(params, ids)[0]

    def terms(params):
        return contracted(params, ids, function=logits)

    assert max(terms(dense)) <= TERMS
    plain, _ = models.apply(config, dense, ids)
    np.testing.assert_allclose(logits(dense, ids), plain, rtol=0, atol=1e-5)
    adapters = qj.lora.init(jax.random.key(1), dense, qj.LoraConfig(rank=2))
    assert max(terms(qj.lora.attach(dense, adapters))) == WIDTH
    # Strict lift raises for a 4-bit weight in pieces, also where it is not `Model` that lifts.
    quantized = qj.quantize_tree(dense, qj.NF4())
    outer = qj.lift(logits, strict=True)(quantized, ids)
    np.testing.assert_array_equal(outer, logits(quantized, ids))
    np.testing.assert_allclose(outer, plain, rtol=0, atol=0.1)
