"""The TPU kernels, simulated on the CPU (memory, copies, races), against float64 NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu, tpu_few, tpu_scales
from tests import four_bit

SIMULATED = pltpu.InterpretParams(detect_races=True)


def check(m, k, n, block, dtype, transposed, target, seed=0, simulated=SIMULATED):
    rng = np.random.default_rng(seed)
    arrays, dense = four_bit.weight(rng, k, n, block)
    x = jnp.asarray(rng.normal(size=(m, n if transposed else k)), dtype)
    dense = dense.T if transposed else dense
    kernel = tpu.nf4_matmul_transposed if transposed else tpu.nf4_matmul
    got = kernel(x, *arrays, jnp.float32, "highest", interpret=simulated, target=target)
    four_bit.check(got, x, dense, "float32")


# Not shrunk: an example takes a second or two, and says enough.
@settings(max_examples=4, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    m=st.integers(1, 40),
    blocks=st.integers(1, 9),
    n=st.integers(1, 140),
    block=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float32]),
    transposed=st.booleans(),
    target=st.sampled_from([4, 5, 6]),
    seed=st.integers(0, 2**20),
)
def test_any_shape(m, blocks, n, block, dtype, transposed, target, seed):
    check(m, blocks * block, n, block, dtype, transposed, target, seed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n", "block"),
    [
        pytest.param(100, 576, 320, 64, id="several blocks of rows, ragged everywhere"),
        pytest.param(3, 1088, 128, 64, id="ragged contraction, few rows"),
        pytest.param(20, 2048, 136, 1024, id="large blocks", marks=pytest.mark.slow),
    ],
)
def test_tiles(m, k, n, block, transposed, monkeypatch):
    """With a sixteenth of the rows in a block that v5 has, so that 100 are several."""
    monkeypatch.setitem(tpu.GENERATIONS, 5, tpu.Generation(64, True))
    check(m, k, n, block, jnp.bfloat16, transposed, target=5)


@pytest.mark.parametrize("target", [4, 5, 6])
@pytest.mark.parametrize(
    ("m", "k", "n", "block"),
    [
        pytest.param(1, 704, 40, 64, id="several blocks in a pass of the matrix unit"),
        pytest.param(20, 768, 256, 128, id="a block in a pass, or two"),
        pytest.param(9, 1024, 128, 512, id="several passes in a block"),
    ],
)
def test_few_rows(m, k, n, block, target, monkeypatch):
    """The step for few rows: more steps than one, with NaN beyond the arrays."""
    monkeypatch.setattr(tpu_few, "DEEPEST", 512)
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    assert tpu_few.suits(m, block, jnp.bfloat16)
    check(m, k, n, block, jnp.bfloat16, False, target, simulated=simulated)


def test_what_the_step_for_few_rows_does_not_take():
    assert not tpu_few.suits(1, 32, jnp.bfloat16)
    assert not tpu_few.suits(1, 192, jnp.bfloat16)
    assert not tpu_few.suits(1, 64, jnp.float32)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_lies_beyond_the_arrays_does_not_matter(transposed):
    """A contraction that ends within a tile: the simulator fills the rest with NaN."""
    params = pltpu.InterpretParams(uninitialized_memory="nan")
    rng = np.random.default_rng(1)
    k, n = (128, 576) if transposed else (1088, 128)
    arrays, dense = four_bit.weight(rng, k, n, 64)
    x = jnp.asarray(rng.normal(size=(16, n if transposed else k)), jnp.float32)
    kernel = tpu.nf4_matmul_transposed if transposed else tpu.nf4_matmul
    got = kernel(x, *arrays, jnp.float32, "highest", interpret=params, target=5)
    want = np.asarray(x, np.float64) @ (dense.T if transposed else dense)
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_a_misfit_is_an_error():
    arrays, _ = four_bit.weight(np.random.default_rng(0), 128, 64, 64)
    with pytest.raises(ValueError, match=r"x \(4, 64\) does not fit a weight of 128 x 64"):
        tpu.nf4_matmul(jnp.zeros((4, 64)), *arrays, jnp.float32)


@pytest.mark.parametrize(
    ("kind", "generation", "reason"),
    [
        ("TPU v3", 6, "it needs a TPU v4 or newer, this is a TPU v3"),
        ("TPU v4", 4, None),
        ("TPU v5 lite", 5, None),
        ("TPU v5p", 5, None),
        ("TPU v6 lite", 6, None),
        ("TPU7x", 6, None),
    ],
)
def test_generations(kind, generation, reason, monkeypatch):
    device = types.SimpleNamespace(platform="tpu", device_kind=kind)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert tpu.generation() == generation
    assert tpu.unavailable() == reason


def test_without_a_tpu_the_newest_generation_is_meant(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [])
    assert tpu.generation() == max(tpu.GENERATIONS)
    assert tpu.unavailable() == "this process has no TPU"


@pytest.mark.parametrize("shape", [(32, 512), (3, 70), (43, 640)])
def test_levels_of_scales(shape):
    table = np.random.default_rng(0).normal(size=256).astype(np.float32)
    codes = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    got = tpu_scales.look_up(jnp.asarray(table), jnp.asarray(codes), SIMULATED)
    np.testing.assert_array_equal(got, table[codes])
