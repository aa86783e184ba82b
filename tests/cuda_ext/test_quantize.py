"""The CUDA kernels that round a weight to 4 bits and make it dense again, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qlora_cuda

from pallas_kernels import reference
from qlora_jax.errors import QloraError
from qlora_jax.quant import FP4, NF4, quantize, use_implementation
from qlora_jax.quant.config import levels
from tests import four_bit

pytestmark = [pytest.mark.usefixtures("kernels"), pytest.mark.slow]
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [32, 64, 512])
def test_dequantize(dtype, block):
    arrays, _ = four_bit.weight(np.random.default_rng(0), 1024, 48, block)
    got = qlora_cuda.dequantize(*arrays, dtype=dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, reference.dequantize(*arrays, dtype))


def test_dequantize_with_double_quantized_scales():
    rng = np.random.default_rng(1)
    (codes, _, codebook), _ = four_bit.weight(rng, 256, 80, 64)
    (scales, *nested), absmax = four_bit.double_quantized(rng, 4, 80)
    got = qlora_cuda.dequantize(codes, scales, codebook, *nested, dtype="float32")
    np.testing.assert_array_equal(got, reference.dequantize(codes, absmax, codebook, "float32"))


@pytest.mark.parametrize(
    "config", [NF4(64, False), FP4(64, False), NF4(32, False), FP4(512, False)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(config, dtype):
    x = np.array(jax.random.normal(jax.random.key(0), (1100, 32)))  # K no multiple of the block
    x[:64] = 0  # blocks of zeros
    x[64, 1] = 1e4  # an outlier
    ascending = np.sort(levels(config.codebook))
    x[128:143, 2] = (ascending[1:] + ascending[:-1]) / 2  # ties, where the largest is 1
    x[128 : 128 + config.block_size, 2].clip(-1, 1, out=x[128 : 128 + config.block_size, 2])
    x[143, 2] = 1
    x = jnp.asarray(x, dtype)
    codes, absmax = qlora_cuda.quantize(x, levels(config.codebook), config.block_size)
    want = quantize(x, config)
    np.testing.assert_array_equal(absmax, want.scales)
    np.testing.assert_array_equal(codes, want.codes)


@pytest.mark.parametrize("shape", [(200, 48), (3, 128, 48), (2, 100, 48)])
def test_in_qlora_jax(shape):
    """By name, single and stacked, K a multiple of the block or not; the same arrays as XLA's."""
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    want = quantize(x, NF4())
    with use_implementation("cuda"):  # the simulated one, which no GPU vouches for
        got = quantize(x, NF4(), implementation="cuda")
        dense = got.dequantize(implementation="cuda")
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(dense, jax.jit(want.dequantize)())


def test_by_name_only_where_it_runs():
    w = quantize(jnp.ones((64, 40)), NF4())
    with pytest.raises(QloraError, match="'cuda' cannot be used: .*"):
        w.dequantize(implementation="cuda")
    with use_implementation("cuda"), pytest.raises(QloraError, match="multiple of 16, got 40"):
        w.dequantize(implementation="cuda")
    with pytest.raises(QloraError, match="'pallas_tpu' has products only"):
        quantize(jnp.ones((64, 16)), NF4(), implementation="pallas_tpu")
