"""The CUDA products against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
import qlora_cuda
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels import reference
from tests import four_bit
from tests.cuda_ext.conftest import ON_A_GPU

pytestmark = [pytest.mark.usefixtures("kernels"), pytest.mark.slow]


def check(m, k, n, block, dtype, transposed, out_dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    arrays, dense = four_bit.weight(rng, k, n, block)
    x = jnp.asarray(rng.normal(size=(m, n if transposed else k)), dtype)
    product = qlora_cuda.nf4_matmul_transposed if transposed else qlora_cuda.nf4_matmul
    got = product(x, *arrays, out_dtype=jnp.dtype(out_dtype))
    four_bit.check(got, x, dense.T if transposed else dense, out_dtype)
    return np.asarray(got)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    m=st.integers(1, 70),
    k=st.integers(1, 6),
    n=st.integers(1, 20),
    block=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(m, k, n, block, dtype, transposed, seed):
    check(m, k * max(block, 64), 16 * n, block, dtype, transposed, seed=seed)


@pytest.mark.parametrize(
    ("m", "k", "n", "block", "transposed"),
    [
        pytest.param(1, 1024, 272, 64, False, id="one row, in two parts, ragged columns"),
        pytest.param(16, 2048, 144, 256, False, id="two tiles of rows, in two parts"),
        pytest.param(3, 192, 128, 32, False, id="the smallest blocks, fewer units than warps"),
        pytest.param(5, 8192, 16, 4096, False, id="the largest blocks"),
        pytest.param(150, 640, 144, 64, False, id="128 rows, in two parts, ragged rows"),
        pytest.param(150, 192, 528, 64, True, id="128 rows, transposed, in two parts, ragged K"),
        pytest.param(40, 4096, 144, 4096, True, id="64 rows, the largest blocks, transposed"),
        pytest.param(17, 4096, 144, 4096, False, id="32 rows, the largest blocks"),
        pytest.param(2, 320, 80, 32, True, id="the smallest blocks, transposed"),
    ],
)
def test_tiles(m, k, n, block, transposed, monkeypatch):
    forwards = check(m, k, n, block, "bfloat16", transposed, "bfloat16")
    # Threads in the reverse order: a missing barrier would show; the sums are the same to the bit.
    monkeypatch.setenv("QLORA_SIMULATOR_ORDER", "-1")
    np.testing.assert_array_equal(
        check(m, k, n, block, "bfloat16", transposed, "bfloat16"), forwards
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_many_rows_multiply_the_very_numbers_of_the_reference(dtype, transposed):
    """x = identity: out comes W itself, fp32 level x fp32 absmax rounded once."""
    arrays, _ = four_bit.weight(np.random.default_rng(2), 128, 128, 64)
    product = qlora_cuda.nf4_matmul_transposed if transposed else qlora_cuda.nf4_matmul
    got = product(jnp.eye(128, dtype=dtype), *arrays, out_dtype=jnp.dtype(dtype))
    want = reference.dequantize(*arrays, dtype)
    np.testing.assert_array_equal(got, want.T if transposed else want)


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("block", [32, 64])
def test_few_rows_read_double_quantized_scales(m, block):
    rng = np.random.default_rng(3)
    k, n = 1024, 208
    (codes, _, codebook), _ = four_bit.weight(rng, k, n, block)
    (scales, *nested), absmax = four_bit.double_quantized(rng, k // block, n)
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    got = qlora_cuda.nf4_matmul(x, codes, scales, codebook, *nested, out_dtype=jnp.float32)
    want = qlora_cuda.nf4_matmul(x, codes, jnp.asarray(absmax), codebook, out_dtype=jnp.float32)
    np.testing.assert_array_equal(got, want)
    dense = np.asarray(reference.dequantize(codes, absmax, codebook, jnp.float32), np.float64)
    four_bit.check(got, x, dense, "float32")


@pytest.mark.skipif(ON_A_GPU, reason="a simulated Turing GPU")
def test_turing_multiplies_float16_with_less_shared_memory(monkeypatch):
    monkeypatch.setenv("QLORA_SIMULATOR_CAPABILITY", "75")
    check(100, 128, 64, 64, "float16", transposed=False)
    with pytest.raises(Exception, match="bfloat16 needs compute capability 8.0, this GPU has 7.5"):
        check(100, 128, 64, 64, "bfloat16", transposed=False)


def test_no_rows():
    arrays, _ = four_bit.weight(np.random.default_rng(0), 64, 32, 64)
    x = jnp.zeros((0, 64), jnp.bfloat16)
    assert qlora_cuda.nf4_matmul(x, *arrays, out_dtype=jnp.float32).shape == (0, 32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 512, 16384])
@pytest.mark.parametrize(("k", "n"), [(64, 16), (4096, 11008), (22016, 8192)])
def test_parts_are_never_empty(m, k, n, transposed):
    parts = qlora_cuda.splits(m, k, n, transposed)
    steps = -(-(n if transposed else k) // 64)
    assert 1 <= parts <= steps
    # As the kernels divide them: each part but the last as long as the first.
    assert (parts - 1) * -(-steps // parts) < steps
