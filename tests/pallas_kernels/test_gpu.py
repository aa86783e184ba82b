"""The GPU kernels against float64 NumPy: on a Hopper GPU with JAX_PLATFORMS=cuda, otherwise
simulated on the CPU by JAX's Mosaic GPU interpreter.

Executed by it: the wrapper, the choice of tiles, the three warpgroups as threads with their
barriers, the pipeline's copies and its zeros beyond the arrays, which bytes and scales meet which
rows of x, scaling and rounding, both decoded buffers, the sums over parts, what is stored where.

Not executed by it, only lowered (below) and compiled (tests/compile): the lookup
by shuffles, of which a model of the instruction is run instead; the layouts of registers; swizzled
memory; the transposed operands of wgmma and the transposed store, for which the interpreter gets
copies. In the interpreter a multiplication is finished at once, so that a missing wait would not
be seen either.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import shared_memory, thread_map
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels import gpu, gpu_decode
from pallas_kernels.gpu_tiles import WARPGROUPS, Tiles, choose
from tests import four_bit

# Beyond an array TMA reads zeros and writes nothing. The interpreter does both from JAX 0.11.2 on;
# older ones read there what stands for uninitialized memory, and drop a store that is partly there.
CLIPS = hasattr(gpu_callbacks, "_clip_store_to_shape")
BEYOND = {} if CLIPS else {"out_of_bounds_reads": "uninitialized", "uninitialized_memory": "zero"}
SIMULATED = InterpretGPUParams(detect_races=True, **BEYOND)
ON_A_GPU = jax.default_backend() == "gpu"


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """Mends what is wrong with the interpreter of JAX before 0.11.2."""
    with pytest.MonkeyPatch.context() as patch:
        if not CLIPS:
            patch.setattr(shared_memory.SharedMemory, "store_buffer_content", store_what_fits)
        if not hasattr(thread_map, "_run"):  # until 0.10.2 every thread of every block traces anew
            patch.setattr(thread_map, "_run_jaxpr", run_jaxpr)
        yield


def store_what_fits(memory, key, place, value, *_, **__):
    with memory.lock:
        memory.mem[key].set_in_bounds_portion(place, value)


def run_jaxpr(jaxpr, consts, *args):
    evaluate.trace(jaxpr, consts, *args).lower().compile()(consts, *args)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(jaxpr, consts, *args):
    jax.core.eval_jaxpr(jaxpr, consts, *args)


@pytest.fixture(autouse=True)
def clean_slate():
    yield
    gpu_callbacks.reset_gpu_interpret_mode_state()  # a failed kernel leaves its memory behind


def check(m, k, n, block, dtype, transposed, out_dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    arrays, dense = four_bit.weight(rng, k, n, block)
    x = jnp.asarray(rng.normal(size=(m, n if transposed else k)), dtype)
    dense = dense.T if transposed else dense
    kernel = gpu.nf4_matmul_transposed if transposed else gpu.nf4_matmul
    got = kernel(x, *arrays, jnp.dtype(out_dtype), interpret=not ON_A_GPU and SIMULATED)
    got.block_until_ready()
    assert ON_A_GPU or not gpu_callbacks.get_races().races_found
    four_bit.check(got, x, dense, out_dtype)


# Not shrunk: an example takes a second or two, and says enough.
@settings(max_examples=4, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    m=st.integers(1, 80),
    k=st.integers(1, 4),
    n=st.integers(1, 4),
    block=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(gpu.DTYPES),
    transposed=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(m, k, n, block, dtype, transposed, seed):
    check(m, k * max(block, 64), 64 * n, block, dtype, transposed, seed=seed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n", "block", "dtype", "out_dtype"),
    [
        pytest.param(1, 64, 64, 64, "bfloat16", "float16", id="a single step"),
        pytest.param(100, 320, 192, 32, "float16", "bfloat16", id="several tiles of rows, ragged"),
        pytest.param(20, 512, 128, 256, "bfloat16", "float32", id="the largest blocks"),
    ],
)
def test_tiles(m, k, n, block, dtype, out_dtype, transposed):
    check(m, k, n, block, dtype, transposed, out_dtype)


@pytest.mark.parametrize("transposed", [False, True])
def test_sums_in_parts(transposed):
    m, k, n = (3, 192, 576) if transposed else (3, 1088, 192)
    tiles = choose(m, k, n, 64, transposed)
    assert tiles.splits == 2 and 2 * tiles.steps * tiles.contraction > (n if transposed else k)
    check(m, k, n, 64, "bfloat16", transposed, "bfloat16")


@pytest.mark.parametrize("transposed", [False, True])
def test_the_tallest_tiles(transposed, monkeypatch):
    """What only larger products get: tiles that leave in four parts, here partly and wholly beyond
    the array, and stages that are used again."""
    monkeypatch.setattr(gpu, "choose", lambda *_: Tiles(256, 64, transposed, 1, 4, 2))
    check(300, 256, 256, 64, "bfloat16", transposed, "bfloat16")


def test_each_decoded_number_is_rounded_once():
    """x = identity: out comes W itself, for every byte, as fp32 codebook x fp32 scale -> bf16."""
    rng = np.random.default_rng(3)
    bytes_ = np.concatenate([rng.permutation(256) for _ in range(16)]).reshape(32, 128)
    scales = rng.uniform(1e-3, 3, (1, 128)).astype(np.float32)
    codebook = rng.normal(size=16).astype(np.float32)
    got = gpu.nf4_matmul(
        jnp.eye(64, dtype=jnp.bfloat16),
        jnp.asarray(bytes_, jnp.uint8),
        jnp.asarray(scales),
        jnp.asarray(codebook),
        jnp.bfloat16,
        interpret=not ON_A_GPU and SIMULATED,
    )
    codes = np.concatenate([bytes_ % 16, bytes_ // 16])
    want = (codebook[codes] * scales).astype(jnp.bfloat16)
    assert (np.asarray(got) == want).all()


def shuffle(values, b, c):
    """shfl.sync.idx.b32 of 32 lanes as the PTX manual defines it, every lane taking part."""
    lanes, clamp, mask = np.arange(32), c & 31, c >> 8 & 31
    last = (lanes & mask) | (clamp & ~mask)
    source = (lanes & mask) | (b & 31 & ~mask)
    return values[np.where(source <= last, source, lanes)]


def test_a_model_of_the_lookup_by_shuffles():
    """The steps of gpu_decode._shuffle on all bytes: shift a word of four codes, shuffle."""
    codebook = np.random.default_rng(0).normal(size=16).astype(np.float32)
    table = np.asarray(gpu_decode.lane_table(jnp.asarray(codebook)))
    assert table.shape == (128,)
    words = np.random.default_rng(1).permutation(np.arange(256).repeat(4)).astype(np.uint8)
    for four in words.reshape(-1, 32, 4):
        word = np.ascontiguousarray(four).view("<u4")[:, 0]
        for byte in range(4):
            for nibble, code in ((0, four[:, byte] % 16), (4, four[:, byte] // 16)):
                lane = word >> np.uint32(8 * byte + nibble)
                for warp in table.reshape(4, 32):
                    found = shuffle(warp, lane.astype(np.int64), gpu_decode._HALF_WARPS)
                    assert (found == codebook[code]).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("m", "block"), [*((m, 64) for m in (1, 16, 65, 4096)), (65, 32), (65, 128), (4096, 256)]
)
def test_it_lowers_for_a_gpu(m, block, transposed):
    """To Mosaic's MLIR: layouts agree, loads and stores meet no bank twice, memory suffices."""
    k, n = 11008, 4160
    shapes = [
        ((m, n if transposed else k), jnp.bfloat16),
        ((k // 2, n), jnp.uint8),
        ((k // block, n), jnp.float32),
        ((16,), jnp.float32),
    ]
    kernel = gpu.nf4_matmul_transposed if transposed else gpu.nf4_matmul
    traced = jax.jit(lambda *a: kernel(*a, jnp.bfloat16)).trace(
        *(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    )
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@given(
    m=st.integers(1, 10_000),
    k=st.integers(1, 500),
    n=st.integers(1, 500),
    block=st.sampled_from(gpu.BLOCK_SIZES),
    transposed=st.booleans(),
)
def test_tiles_cover_and_fit(m, k, n, block, transposed):
    k, n = k * max(block, 64), n * 64
    tiles = choose(m, k, n, block, transposed)
    depth, part = n if transposed else k, tiles.steps * tiles.contraction
    assert (tiles.splits - 1) * part < depth <= tiles.splits * part
    assert tiles.m % 8 == 0 and tiles.rows % max(block, 64) == 0
    assert tiles.m * tiles.outputs <= 128 * 128  # sums in 128 registers of 128 threads
    once, each = tiles.shared(block)
    assert tiles.stages >= 2 and once + each * tiles.stages <= 227 << 10
    assert WARPGROUPS * tiles.outputs == (tiles.step_k if transposed else tiles.step_n)


@pytest.mark.parametrize(
    ("k", "n", "block", "dtype", "message"),
    [
        (128, 128, 64, jnp.float32, "x must be bfloat16 or float16, got float32"),
        (128, 128, 16, jnp.bfloat16, r"block_size must be one of \(32, 64, 128, 256\), got 16"),
        (128, 100, 64, jnp.bfloat16, "must be multiples of 64, got K=128 x N=100"),
        (96, 128, 32, jnp.bfloat16, "must be multiples of 64, got K=96 x N=128"),
    ],
)
def test_what_it_does_not_take(k, n, block, dtype, message):
    arrays, _ = four_bit.weight(np.random.default_rng(0), k, n, block)
    with pytest.raises(ValueError, match=message):
        gpu.nf4_matmul(jnp.zeros((4, k), dtype), *arrays, jnp.float32)


def test_a_misfit_is_an_error():
    arrays, _ = four_bit.weight(np.random.default_rng(0), 128, 64, 64)
    with pytest.raises(ValueError, match=r"x \(4, 64\) does not fit a weight of 128 x 64"):
        gpu.nf4_matmul(jnp.zeros((4, 64), jnp.bfloat16), *arrays, jnp.float32)


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "reason"),
    [
        ("cpu", "cpu", None, "it needs a Hopper GPU, the default device is a cpu"),
        ("gpu", "NVIDIA H200", "9.0", None),
        ("gpu", "RTX A6000", "8.6", "compute capability 9.0 (Hopper), this RTX A6000 has 8.6"),
        ("gpu", "NVIDIA B200", "10.0", "(Hopper), this NVIDIA B200 has 10.0"),
        ("gpu", "MI300X", "gfx942", "(Hopper), this MI300X has gfx942"),
    ],
)
def test_unavailable(platform, kind, capability, reason, monkeypatch):
    device = types.SimpleNamespace(
        platform=platform, device_kind=kind, compute_capability=capability
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    got = gpu.unavailable()
    assert got == reason if reason is None else reason in got
