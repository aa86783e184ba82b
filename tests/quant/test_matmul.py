"""nf4_matmul and its transpose against the product with the dequantized weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import QloraError
from qlora_jax.quant import FP4, NF4, nf4_matmul, nf4_matmul_transposed, pieces, quantize

pytestmark = pytest.mark.quick

CONFIGS = [NF4(), NF4(32, False), FP4(), FP4(128, False)]
# fp32: two orders of summation over K or N of unit numbers; bf16: one rounding of the result.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2**-7}

configs = pytest.mark.parametrize("config", CONFIGS, ids=str)
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: d.__name__)


def problem(config, dtype, k=200, n=48):
    rng = np.random.default_rng(0)
    w = quantize(rng.normal(size=(k, n)).astype(np.float32) / np.sqrt(k), config)
    x = jnp.asarray(rng.normal(size=(2, 7, k)), dtype)
    g = jnp.asarray(rng.normal(size=(2, 7, n)), dtype)
    # The same rounding of the weight to the dtype of the product, then fp64.
    dense = np.asarray(w.dequantize(dtype).astype(jnp.float32), np.float64)
    return w, x, g, dense


def as64(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


@configs
@dtypes
def test_products(config, dtype):
    w, x, g, dense = problem(config, dtype)
    tolerance = TOLERANCE[dtype]
    y = nf4_matmul(x, w)
    assert y.dtype == dtype
    np.testing.assert_allclose(as64(y), as64(x) @ dense, rtol=tolerance, atol=tolerance)
    y = nf4_matmul_transposed(g, w)
    np.testing.assert_allclose(as64(y), as64(g) @ dense.T, rtol=tolerance, atol=tolerance)


@configs
@dtypes
def test_gradients_flow_to_the_input(config, dtype):
    w, x, g, dense = problem(config, dtype)
    tolerance = TOLERANCE[dtype]
    y, pullback = jax.vjp(lambda x: nf4_matmul(x, w), x)
    np.testing.assert_allclose(
        as64(pullback(g)[0]), as64(g) @ dense.T, rtol=tolerance, atol=tolerance
    )
    y, pullback = jax.vjp(lambda g: nf4_matmul_transposed(g, w), g)
    assert y.shape == x.shape
    np.testing.assert_allclose(
        as64(pullback(x)[0]), as64(x) @ dense, rtol=tolerance, atol=tolerance
    )


def test_bf16_products_accumulate_in_fp32():
    w, x, _, dense = problem(NF4(), jnp.bfloat16, k=4096)
    y = nf4_matmul(x, w, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, as64(x) @ dense, rtol=1e-4, atol=1e-4)


def test_vmap_over_stacked_weights():
    rng = np.random.default_rng(0)
    w = quantize(rng.normal(size=(3, 96, 8)).astype(np.float32), NF4())
    x = jnp.asarray(rng.normal(size=(3, 5, 96)), jnp.float32)
    np.testing.assert_allclose(
        jax.vmap(nf4_matmul)(x, w),
        jnp.einsum("lmk,lkn->lmn", x, w.dequantize()),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_products_of_nothing_are_empty(lead):
    w, x, g, _ = problem(NF4(), jnp.float32)
    x, g = jnp.ones((*lead, x.shape[-1])), jnp.ones((*lead, g.shape[-1]))
    y, pullback = jax.vjp(lambda x: nf4_matmul(x, w), x)
    assert y.shape == g.shape and pullback(g)[0].shape == x.shape
    assert nf4_matmul_transposed(g, w).shape == x.shape


def test_integers_are_refused():
    w, x, g, _ = problem(NF4(), jnp.float32)
    with pytest.raises(QloraError, match="int32 .* give x in a floating type"):
        nf4_matmul(x.astype(jnp.int32), w)
    with pytest.raises(QloraError, match="int32 .* give x in a floating type"):
        nf4_matmul_transposed(g.astype(jnp.int32), w)


def test_refuses_what_does_not_fit():
    w, x, g, _ = problem(NF4(), jnp.float32)
    with pytest.raises(ValueError, match="its last axis must be 200"):
        nf4_matmul(g, w)
    with pytest.raises(ValueError, match="its last axis must be 48"):
        nf4_matmul_transposed(x, w)
    stacked = quantize(np.ones((2, 64, 4), np.float32), NF4())
    with pytest.raises(ValueError, match="use jax.vmap"):
        nf4_matmul(jnp.ones((3, 64)), stacked)


def test_no_dense_weight_is_kept_for_the_backward_pass():
    """Between the passes only the 4-bit leaves may be alive: their sizes, not K x N floats."""
    w = quantize(jax.ShapeDtypeStruct((512, 1024), jnp.float32), NF4())
    x = jax.ShapeDtypeStruct((4, 512), jnp.float32)
    _, pullback = jax.eval_shape(lambda x, w: jax.vjp(lambda x: nf4_matmul(x, w), x), x, w)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))
    assert kept < 1.1 * w.nbytes


@dtypes
def test_large_weights_in_pieces(dtype, monkeypatch):
    """The same products, in pieces that divide either side; under vmap and in the gradient too."""
    w, x, g, dense = problem(NF4(), dtype, k=320, n=48)
    monkeypatch.setattr(pieces, "LIMIT", 320 * 48 // 4)
    assert pieces.is_large(w.codes)
    assert pieces._count(48, 320) == 4 and pieces._count(5, 64 * 48) == 5
    tolerance = TOLERANCE[dtype]
    y, pullback = jax.vjp(jax.vmap(lambda x: nf4_matmul(x, w)), x)
    np.testing.assert_allclose(as64(y), as64(x) @ dense, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(
        as64(pullback(g)[0]), as64(g) @ dense.T, rtol=tolerance, atol=tolerance
    )
    # Nothing near seven pieces divides eleven blocks, so that they stay together.
    assert pieces._count(11, 7 * pieces.LIMIT // 11) == 11
    assert pieces._count(31, 4 * pieces.LIMIT // 31) == 1
