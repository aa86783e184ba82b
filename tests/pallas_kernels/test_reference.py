"""The plain-JAX meaning of the kernels against NumPy loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from tests.quant import oracle

BLOCK = 32


@pytest.fixture
def weight():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, size=(4 * BLOCK, 6)).astype(np.uint8)
    scales = rng.uniform(0.1, 2, size=(4, 6)).astype(np.float32)
    dense = oracle.NF4[codes] * np.repeat(scales, BLOCK, axis=0)
    return codes, scales, dense


def test_layout_of_a_byte(weight):
    codes, _, _ = weight
    packed = np.asarray(reference.pack(jnp.asarray(codes), BLOCK))
    assert packed.shape == (2 * BLOCK, 6)
    for row in (0, 5, 16, 33):
        block, i = divmod(row, BLOCK // 2)
        low, high = codes[block * BLOCK + i], codes[block * BLOCK + i + BLOCK // 2]
        assert (packed[row] == low + 16 * high).all()


def test_unpack_is_the_inverse_with_leading_axes(weight):
    codes = jnp.stack([jnp.asarray(weight[0]), jnp.asarray(weight[0][::-1])])
    assert (reference.unpack(reference.pack(codes, BLOCK), BLOCK) == codes).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dequantize(weight, dtype):
    codes, scales, dense = weight
    packed = reference.pack(jnp.asarray(codes), BLOCK)
    out = reference.dequantize(packed, jnp.asarray(scales), jnp.asarray(oracle.NF4), dtype)
    assert out.dtype == dtype
    assert (np.asarray(out) == dense.astype(np.dtype(dtype))).all()


def test_products(weight):
    codes, scales, dense = weight
    packed = reference.pack(jnp.asarray(codes), BLOCK)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, dense.shape[0])).astype(np.float32)
    g = rng.normal(size=(5, dense.shape[1])).astype(np.float32)
    leaves = (packed, jnp.asarray(scales), jnp.asarray(oracle.NF4), jnp.float32)
    y = reference.nf4_matmul(jnp.asarray(x), *leaves)
    np.testing.assert_allclose(y, x @ dense, rtol=1e-5, atol=1e-5)
    y = reference.nf4_matmul_transposed(jnp.asarray(g), *leaves)
    np.testing.assert_allclose(y, g @ dense.T, rtol=1e-5, atol=1e-5)
