"""What the handlers refuse, through XLA's FFI: a status in words, never a crash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import four_bit

pytestmark = [pytest.mark.usefixtures("kernels"), pytest.mark.slow]

K, N, M = 128, 48, 4
ARRAYS, _ = four_bit.weight(np.random.default_rng(0), K, N, 64)
NESTED, _ = four_bit.double_quantized(np.random.default_rng(0), K // 64, N)
GOOD = {
    "x": jnp.zeros((M, K), jnp.bfloat16),
    "codes": ARRAYS[0],
    "codebook": ARRAYS[2],
    "scales": ARRAYS[1],
}
NESTED_GOOD = {
    **GOOD, "scales": NESTED[0], "nested": NESTED[1], "offset": NESTED[2], "levels": NESTED[3],
}  # fmt: skip


def call(target, arguments, results, **attributes):
    return jax.block_until_ready(jax.ffi.ffi_call(target, results)(*arguments, **attributes))


def array(shape, dtype):
    return jnp.zeros(shape, dtype)


def result(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": array((M, K), "float32")}, r"x must be bfloat16 or float16, got float32\[4, 128\]"),
        ({"x": array((M, N), "bfloat16")}, r"x must be bfloat16\[4, 128\], got bfloat16\[4, 48\]"),
        ({"x": array((M, 2, K), "bfloat16")}, r"x must be \[M, K\] and y \[splits, M, N\], got"),
        (
            {"codes": array((K // 2, N), "int8")},
            r"codes must be uint8\[64, 48\], got another dtype",
        ),
        ({"codes": array((K // 2,), "uint8")}, r"codes must be uint8\[K/2, N\]"),
        ({"codes": array((K // 2, 40), "uint8")}, r"N one of 16, got K=128 x N=40"),
        ({"codes": array((48, N), "uint8")}, r"K must be a multiple of 64 .* got K=96 x N=48"),
        ({"scales": array((3, N), "float32")}, r"a power of two from 32 to 4096.* makes 128/3"),
        ({"scales": array((0, N), "float32")}, r"K=128 in 0 blocks"),
        ({"scales": array((2, 32), "float32")}, r"scales must be float32\[2, 48\], got .*2, 32"),
        ({"scales": array((2, N), "uint8")}, r"scales must be float32\[2, 48\], got uint8"),
        ({"codebook": array((256,), "float32")}, r"codebook must be float32\[16\]"),
        ({"nested": array((1,), "float32")}, r"3 arrays, got 1"),
    ],
)
def test_matmul(changed, message):
    with pytest.raises(Exception, match=message):
        call("qlora_matmul", (GOOD | changed).values(), result(1, M, N), transposed=False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scales": ARRAYS[1]}, r"scales must be uint8\[2, 48\], got float32"),
        ({"nested": array((2,), "float32")}, r"nested must be float32\[1\], got float32\[2\]"),
        ({"offset": array((1,), "float32")}, r"offset must be float32\[\], got float32\[1\]"),
        ({"levels": array((16,), "float32")}, r"levels must be float32\[256\]"),
        ({"x": array((17, K), "bfloat16")}, "for at most 16 rows of x .* got M=17"),
    ],
)
def test_double_quantized_scales(changed, message):
    arguments = NESTED_GOOD | changed
    with pytest.raises(Exception, match=message):
        shape = result(1, arguments["x"].shape[0], N)
        call("qlora_matmul", arguments.values(), shape, transposed=False)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (result(M, N), r"y \[splits, M, N\], got bfloat16\[4, 128\] and float32\[4, 48\]"),
        (result(1, M, K), r"y must be float32\[1, 4, 48\], got float32\[1, 4, 128\]"),
        (result(2, M, N, dtype="bfloat16"), "of float32 where they are several"),
        (result(1, M, N, dtype="int32"), "y must be float32, bfloat16 or float16"),
    ],
)
def test_the_result(shape, message):
    with pytest.raises(Exception, match=message):
        call("qlora_matmul", GOOD.values(), shape, transposed=False)


def test_transposed_wants_fp32_scales():
    arguments = NESTED_GOOD | {"x": array((M, N), "bfloat16")}
    with pytest.raises(Exception, match="not for the transposed product"):
        call("qlora_matmul", arguments.values(), result(1, M, K), transposed=True)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (result(K, N, dtype="int8"), "y must be float32, bfloat16 or float16"),
        (result(K, K), r"y must be float32\[128, 48\], got float32\[128, 128\]"),
    ],
)
def test_dequantize(shape, message):
    with pytest.raises(Exception, match=message):
        call("qlora_dequantize", ARRAYS[:1] + ARRAYS[2:] + ARRAYS[1:2], shape)


@pytest.mark.parametrize(
    ("x", "codes", "absmax", "message"),
    [
        (array((K, 40), "float32"), (64, 40), (2, 40), "N a multiple of 16"),
        (array((K, N), "int32"), (64, N), (2, N), "x must be .* of float32"),
        (array((K, N), "float32"), (64, N), (3, N), "must be a power of two from 32 to 4096"),
        (array((K, N), "float32"), (32, N), (1, N), "just cover K"),
        (array((K, N), "float32"), (128, N), (4, N), "just cover K"),
        (array((K, N), "float32"), (64, 16), (2, N), r"codes must be uint8\[64, 48\]"),
    ],
)
def test_quantize(x, codes, absmax, message):
    results = (result(*codes, dtype="uint8"), result(*absmax))
    with pytest.raises(Exception, match=message):
        call("qlora_quantize", (x, array((15,), "float32"), array((16,), "uint8")), results)
