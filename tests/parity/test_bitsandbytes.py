"""The stored comparison of tests/quant once more, against the bitsandbytes that is installed."""

import jax
import ml_dtypes
import numpy as np
import pytest

from qlora_jax.quant import QuantizedArray, bnb
from tests.goldens import cases
from tests.parity import peer
from tests.quant import oracle, ours

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
codebooks = pytest.mark.parametrize("codebook", ["nf4", "fp4"])


def test_the_stored_answers_are_still_the_answers(golden):
    for case in cases.cases():
        weight = cases.weight(case.weight, golden["real"]).astype(cases.DTYPES[case.dtype])
        answer = peer.quantize(weight, case.codebook, case.block_size, double_quant=False)
        for key in ("packed", "absmax"):
            assert answer[key].tobytes() == golden[f"{case.name}/{key}"].tobytes(), case.name


@codebooks
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("block_size", cases.BLOCK_SIZES)
def test_random_weights(codebook, dtype, block_size):
    rng = np.random.default_rng(block_size)
    weight = (rng.normal(size=(48, 4096)) * np.exp(rng.normal(size=(48, 1)))).astype(dtype)
    weight[3, :4096] = 0
    weight[5, 70] = 300
    answer = peer.quantize(weight, codebook, block_size, double_quant=False)
    w = ours.quantized(weight, codebook, block_size)
    codes, absmax = ours.codes_and_scales(w)
    assert (codes == oracle.unpack(answer["packed"], weight.size)).all()
    assert absmax.tobytes() == answer["absmax"].tobytes()
    dense = np.asarray(w.dequantize().astype(np.float32)).T
    assert (dense == answer["dense"].astype(np.float32)).all()


@codebooks
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_double_quantized_weights_are_taken_over(codebook, dtype):
    """Their stored tensors in our array mean, to the bit, the weight that they mean over there."""
    weight = np.random.default_rng(0).normal(size=(256, 1024)).astype(dtype)
    answer = peer.quantize(weight, codebook, 64, double_quant=True)
    w = bnb.from_bitsandbytes(answer, weight.shape, codebook, 64, dtype)
    dense = np.asarray(w.dequantize().astype(np.float32)).T
    assert (dense == answer["dense"].astype(np.float32)).all()
    stored = bnb.to_bitsandbytes(w)
    assert stored["packed"].reshape(-1).tobytes() == answer["packed"].tobytes()
    for key in ("absmax", "nested_absmax", "nested_offset"):
        assert stored[key].tobytes() == answer[key].tobytes(), key
    # Under jit one fp32 rounding less may be taken in the scales: 2^-23 relative, and where that
    # falls on a tie of a 16-bit dtype, one of its steps.
    step = {2: 2.0**-8 if dtype is ml_dtypes.bfloat16 else 2.0**-10, 4: 2.0**-22}
    jitted = np.asarray(jax.jit(QuantizedArray.dequantize)(w).astype(np.float32)).T
    np.testing.assert_allclose(jitted, dense, rtol=step[np.dtype(dtype).itemsize], atol=0)


@codebooks
def test_double_quantization_of_random_weights(codebook):
    weight = np.random.default_rng(1).normal(size=(256, 2048)).astype(np.float32)
    answer = peer.quantize(weight, codebook, 64, double_quant=True)
    stored = bnb.to_bitsandbytes(ours.quantized(weight, codebook, 64, double_quant=True))
    assert stored["packed"].reshape(-1).tobytes() == answer["packed"].tobytes()
    # The offset is a mean: its last bits are the order of summation's.
    np.testing.assert_allclose(stored["nested_offset"], answer["nested_offset"], rtol=1e-6)
    np.testing.assert_allclose(stored["nested_absmax"], answer["nested_absmax"], rtol=1e-5)
    # The CPU build misses the nearest 8-bit code in about 0.15% of cases, and then by one.
    different = stored["absmax"].astype(int) - answer["absmax"]
    assert np.abs(different).max() <= 1
    assert (different != 0).mean() < 0.005


def test_quantized_in_any_16_bit_storage_they_are_the_same_bytes():
    """bnb_4bit_quant_storage views the same bytes as another type; the importer may rely on it."""
    import bitsandbytes.functional as functional
    import torch

    weight = torch.from_numpy(cases.bell(7, (8, 256)))
    plain, _ = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    for storage in (torch.bfloat16, torch.float32):
        viewed, _ = functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", quant_storage=storage
        )
        assert (viewed.view(torch.uint8).reshape(-1) == plain.reshape(-1)).all()
