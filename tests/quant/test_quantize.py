"""quantize(): meaning, layout, tails, stacking, tracing, and what it refuses."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qlora_jax.errors import QloraError
from qlora_jax.quant import FP4, NF4, QuantConfig, QuantizedArray, bnb, quantize
from tests.goldens import cases
from tests.quant import oracle, ours


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("k", [64, 50, 1, 130, 192])
def test_every_column_is_quantized_on_its_own(codebook, k):
    x = normal((k, 5))
    w = ours.quantized(x.T, codebook, 64)
    dense = np.asarray(w.dequantize())
    for column in range(5):
        codes, absmax = oracle.quantize(x[:, column], codebook, 64)
        assert (ours.codes(w)[:, column] == codes).all()
        assert (np.asarray(w.scales)[:, column] == absmax).all()
        expected = oracle.dequantize(codes, absmax, codebook, 64)
        assert dense[:, column].tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtype_is_remembered_and_dequantizing_rounds_once(dtype):
    x = normal((128, 8), dtype=dtype)
    w = quantize(x, NF4(double_quant=False))
    assert w.dtype == np.dtype(dtype)
    dense = np.asarray(w.dequantize())
    codes, absmax = oracle.quantize(x.T, "nf4", 64)
    expected = oracle.dequantize(codes, absmax, "nf4", 64).reshape(8, 128).T.astype(dtype)
    assert dense.dtype == np.dtype(dtype)
    assert (dense == expected).all()


def test_double_quantized_scales_have_their_meaning(golden):
    x = normal((512, 96)) * np.linspace(0.1, 3, 96, dtype=np.float32)
    w = quantize(x, NF4())
    _, absmax = oracle.quantize(x.T, "nf4", 64)
    table = golden["dynamic_map"]
    codes, nested = oracle.nearest_scale_codes(absmax, np.asarray(w.offset), table)
    assert (np.asarray(w.scales).T.reshape(-1) == codes).all()
    assert (np.asarray(w.nested) == nested).all()
    np.testing.assert_allclose(w.offset, absmax.astype(np.float64).mean(), rtol=1e-6)
    restored = table[codes] * np.repeat(nested, 256)[: codes.size] + np.asarray(w.offset)
    assert (np.asarray(w.absmax()).T.reshape(-1) == restored).all()
    # The product's last bit is free under jit, where XLA may fuse it and the sum.
    free = np.spacing(np.abs(np.asarray(w.absmax())) + np.asarray(w.offset))
    fused = np.asarray(jax.jit(QuantizedArray.absmax)(w))
    assert (np.abs(fused - np.asarray(w.absmax())) <= free).all()


@pytest.mark.parametrize("config", [NF4(), NF4(32, False), FP4(128), FP4(64, False)], ids=str)
def test_stacked_weights_equal_each_weight_alone(config):
    x = normal((3, 2, 200, 12))
    stacked = quantize(x, config)
    assert stacked.shape == x.shape
    assert stacked.batch_shape == (3, 2)
    alone = quantize(x[2, 1], config)
    assert (stacked.codes[2, 1] == alone.codes).all()
    # The offset's last bit depends on the order of summation.
    np.testing.assert_allclose(stacked.absmax()[2, 1], alone.absmax(), rtol=1e-6)
    if not config.double_quant:
        assert (stacked.scales[2, 1] == alone.scales).all()
    restacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[alone, alone])
    assert restacked.shape == (2, 200, 12)
    assert (restacked.dequantize()[1] == alone.dequantize()).all()


def test_several_axes_on_either_side():
    x = normal((4, 96, 2, 8))
    w = quantize(x, NF4(), axes=(1, 2))
    flat = quantize(x.reshape(4, 96, 16), NF4())
    assert w.shape == x.shape and w.batch_shape == (4,)
    assert (w.dequantize() == flat.dequantize().reshape(x.shape)).all()
    w = quantize(x, NF4(), axes=(2, 1))
    assert w.batch_shape == (4,) and w.k_shape == (96, 2) and w.shape == x.shape


def test_rows_are_those_of_the_dense_weight():
    x = normal((150, 6))
    w = quantize(x, NF4())
    ids = jnp.asarray([[0, 149], [31, 64]])
    assert (w.rows(ids) == w.dequantize()[ids]).all()


def test_four_point_one_two_seven_bits():
    """Counted from the leaves, at a size where the one offset does not show."""
    w = quantize(jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), NF4())
    assert 8 * w.nbytes / w.size == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    w = quantize(jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), NF4(double_quant=False))
    assert 8 * w.nbytes / w.size == 4.5
    real = quantize(normal((512, 512)), NF4())
    assert real.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(real))


def test_repr_says_what_it_is():
    w = quantize(jax.ShapeDtypeStruct((2, 4096, 4096), jnp.bfloat16), NF4())
    expected = (
        "QuantizedArray(NF4-64+DQ, shape=(2, 4096, 4096), dtype=bfloat16, 4.127 bits per weight)"
    )
    assert repr(w) == expected
    assert "4.500 bits" in repr(quantize(normal((64, 4)), FP4(double_quant=False)))
    assert "codes=True" in repr(jax.tree.map(lambda _: True, w)), "a mask of the same structure"


@pytest.mark.parametrize("config", [NF4(), FP4(32, False)], ids=str)
def test_jit_and_abstract_values_agree_with_eager(config):
    x = normal((2, 100, 12), dtype=ml_dtypes.bfloat16)
    eager = quantize(x, config)
    jitted = jax.jit(lambda x: quantize(x, config))(x)
    abstract = quantize(jax.ShapeDtypeStruct(x.shape, x.dtype), config)
    traced = jax.eval_shape(lambda x: quantize(x, config), x)
    structure = jax.tree.structure(eager)
    for other in (jitted, abstract, traced):
        assert jax.tree.structure(other) == structure
        assert other.shape == eager.shape and other.nbytes == eager.nbytes
        assert repr(other) == repr(eager)
        for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(other), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert (jitted.codes == eager.codes).all()
    dense = jax.eval_shape(QuantizedArray.dequantize, abstract)
    assert (dense.shape, dense.dtype) == (x.shape, eager.dtype)


def test_passes_through_jit_scan_and_vmap():
    x = normal((3, 128, 4))
    w = quantize(x, NF4())
    dense = w.dequantize()
    assert (jax.jit(lambda w: w)(w).dequantize() == dense).all()
    _, scanned = jax.lax.scan(lambda c, w: (c, w.dequantize()), 0, w)
    np.testing.assert_allclose(scanned, dense, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(QuantizedArray.dequantize)(w), dense, rtol=1e-6)


def test_a_second_call_does_not_compile_again():
    from qlora_jax.quant import array

    quantize(normal((128, 16)), NF4())
    before = array._quantize_jit._cache_size()
    quantize(normal((128, 16), seed=1), NF4(), name="other")
    assert array._quantize_jit._cache_size() == before


def test_zero_blocks_stay_zero_under_double_quantization():
    x = normal((256, 8))
    x[64:128], x[:, 3] = 0.0, 0.0
    for config in (NF4(), FP4()):
        dense = np.asarray(quantize(x, config).dequantize())
        assert (dense[64:128] == 0).all() and (dense[:, 3] == 0).all()
    assert (np.asarray(quantize(np.zeros((64, 4), np.float32), NF4()).dequantize()) == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_unusable_elements_are_refused_by_name(value, dtype):
    x = normal((64, 8), dtype=dtype)
    x[3, 3] = x[9, 2] = value
    with pytest.raises(QloraError, match=r"layers/mlp/up_proj/kernel: 2 of 512 elements are not"):
        quantize(x, NF4(), name="layers/mlp/up_proj/kernel")


def test_large_and_small_weights_keep_their_scale():
    for scale in (1e37, 1e-30):
        x = normal((64, 4)) * np.float32(scale)
        dense = np.asarray(quantize(x, NF4(double_quant=False)).dequantize())
        assert np.abs(dense - x).max() <= 0.16 * np.abs(x).max()


def test_refuses_what_is_no_weight():
    with pytest.raises(QloraError, match=r"bias: cannot quantize shape \(8,\)"):
        quantize(np.zeros(8, np.float32), NF4(), name="bias")
    with pytest.raises(QloraError, match="empty: cannot quantize"):
        quantize(jax.ShapeDtypeStruct((0, 8), jnp.float32), NF4(), name="empty")
    with pytest.raises(QloraError, match="ids: only floating-point weights .* int32"):
        quantize(np.zeros((8, 8), np.int32), NF4(), name="ids")


@pytest.mark.parametrize("block_size", [0, 16, 48, 8192])
def test_refuses_other_block_sizes(block_size):
    with pytest.raises(QloraError, match="power of two from 32 to 4096"):
        NF4(block_size)


def test_refuses_an_unknown_code_book():
    with pytest.raises(QloraError, match="unknown code book 'nf5'"):
        QuantConfig("nf5")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_bitsandbytes_order_and_back(codebook, double_quant):
    weight = cases.bell(9, (24, 256))
    w = ours.quantized(weight, codebook, 64, double_quant)
    stored = bnb.to_bitsandbytes(w)
    codes, _ = oracle.quantize(weight, codebook, 64)
    assert (oracle.unpack(stored["packed"], codes.size) == codes).all()
    back = bnb.from_bitsandbytes(stored, (24, 256), codebook, 64, np.float32)
    assert jax.tree.structure(back) == jax.tree.structure(w)
    for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(back), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_bitsandbytes_order_refuses_what_it_cannot_hold():
    with pytest.raises(QloraError, match="no bitsandbytes form"):
        bnb.to_bitsandbytes(quantize(normal((100, 4)), NF4()))
    with pytest.raises(QloraError, match="no bitsandbytes form"):
        bnb.to_bitsandbytes(quantize(normal((2, 64, 4)), NF4()))
    stored = bnb.to_bitsandbytes(quantize(normal((64, 4)), NF4()))
    with pytest.raises(QloraError, match="no multiple of the block 64"):
        bnb.from_bitsandbytes(stored, (4, 100), "nf4", 64, np.float32)
    with pytest.raises(QloraError, match="do not make a weight"):
        bnb.from_bitsandbytes(stored, (8, 64), "nf4", 64, np.float32)
    with pytest.raises(QloraError, match="do not make a weight"):
        bnb.from_bitsandbytes(stored, (4, 64), "nf4", 32, np.float32)
