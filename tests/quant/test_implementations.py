"""Choosing an implementation; what vmap and meshes do to a kernel that XLA cannot look into."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qlora_jax as qj
from pallas_kernels import reference
from qlora_jax.quant import implementations
from qlora_jax.quant.blockwise import dequantize_scales
from qlora_jax.quant.kernel_call import kernel_call
from qlora_jax.quant.matmul import nf4_matmul, nf4_matmul_transposed

pytestmark = pytest.mark.quick

K, N = 512, 256


def quantized(n: int = N, seed: int = 0, double_quant: bool = True) -> qj.QuantizedArray:
    x = jax.random.normal(jax.random.key(seed), (K, n))
    return qj.quantize(x, qj.NF4(double_quant=double_quant))


def test_backends_name_every_implementation():
    found = qj.backends()
    assert set(found) == set(implementations.IMPLEMENTATIONS)
    assert found["xla"] == "available"
    assert found["pallas_tpu"] == "this process has no TPU"
    assert "the default device is a cpu" in found["pallas_gpu"]
    assert "qlora-jax-cuda" in found["cuda"]


def test_what_is_not_here_is_refused_by_name():
    x = jnp.ones((2, K))
    with pytest.raises(qj.QloraError, match="'pallas_tpu' cannot be used: this process has no TPU"):
        nf4_matmul(x, quantized(), implementation="pallas_tpu")
    with pytest.raises(qj.QloraError, match="expected one of xla, pallas_tpu"):
        nf4_matmul(x, quantized(), implementation="triton")  # type: ignore[arg-type]
    with (
        qj.use_implementation("pallas_tpu"),
        pytest.raises(qj.QloraError, match="x must be bfloat16 or float32, got float16"),
    ):
        nf4_matmul(x.astype(jnp.float16), quantized())


@pytest.mark.parametrize("product", [nf4_matmul, nf4_matmul_transposed])
def test_the_kernel_and_its_gradient_mean_what_xla_means(product):
    # Square, for both products, and small: what the simulator runs takes long to compile.
    w = qj.quantize(jax.random.normal(jax.random.key(0), (128, 128)), qj.NF4())
    x = jax.random.normal(jax.random.key(1), (2, 3, 128))

    def loss(x):
        return jnp.sum(jnp.sin(product(x, w, precision="highest")))

    want = jax.jit(jax.value_and_grad(loss))(x)
    with pltpu.force_tpu_interpret_mode(), qj.use_implementation("pallas_tpu"):
        got = jax.value_and_grad(loss)(x)  # under jit, the simulator cannot be partitioned
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
    np.testing.assert_allclose(got[1], want[1], atol=2e-4)


def counting(calls: list[tuple[int, ...]], transposed: bool = False, nested_rows: int = 0):
    def reads_nested(rows: int) -> bool:
        return rows <= nested_rows

    plain = reference.nf4_matmul_transposed if transposed else reference.nf4_matmul

    def kernel(x, codes, scales, codebook, *nested, out_dtype, precision):
        calls.append(x.shape)
        if nested:
            assert reads_nested(x.shape[0])
            scales = dequantize_scales(scales, *nested)
        assert scales.dtype == jnp.float32
        return plain(x, codes, scales, codebook, out_dtype, precision)

    call = kernel_call(kernel, transposed=transposed, reads_nested=reads_nested)
    return functools.partial(call, out_dtype=jnp.float32, precision=None)


def arrays(w: qj.QuantizedArray):
    return w.codes, w.scales, jnp.linspace(-1, 1, 16), *w.nested_scales()


def dense(w: qj.QuantizedArray) -> jax.Array:
    return reference.dequantize(w.codes, w.absmax(), jnp.linspace(-1, 1, 16), jnp.float32)


@pytest.mark.parametrize("nested_rows", [0, 4])
def test_a_batch_of_inputs_folds_into_rows(nested_rows):
    calls: list[tuple[int, ...]] = []
    call = counting(calls, nested_rows=nested_rows)
    w = quantized()
    x = jax.random.normal(jax.random.key(0), (3, 5, 4, K))
    run = jax.vmap(jax.vmap(lambda x: call(x, *arrays(w))))
    got = jax.jit(run)(x)
    assert set(calls) == {(4, K), (20, K), (60, K)}  # traced for one, for five, run for sixty
    np.testing.assert_allclose(got, x @ dense(w), atol=1e-4)


def test_a_weight_for_each_input():
    call = counting([])
    ws = [quantized(seed=i) for i in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *map(arrays, ws))
    x = jax.random.normal(jax.random.key(0), (3, 4, K))
    got = jax.vmap(lambda x, *w: call(x, *w))(x, *stacked)
    for i, w in enumerate(ws):
        np.testing.assert_allclose(got[i], x[i] @ dense(w), atol=1e-4)


PLACES = {
    "FSDP, along K": (P("data", None), P("data", None)),
    "FSDP, along N": (P("data", None), P(None, "data")),
    "tensor parallel, along N": (P("data", None), P(None, "model")),
    "tensor parallel, along K": (P("data", None), P("model", None)),
    "all devices, along K": (P(None, None), P(("data", "model"), None)),
    "both axes": (P(("data", "model"), None), P("data", "model")),
    "not split": (P("data", None), P(None, None)),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("place", "double_quant"),
    [*((place, True) for place in PLACES), ("both axes", False), ("FSDP, along K", False)],
)
def test_on_a_mesh(place, transposed, double_quant):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    rows, spec = PLACES[place]
    w = quantized(double_quant=double_quant)
    codes, scales, codebook, *nested = arrays(w)
    x = jax.random.normal(jax.random.key(0), (32, N if transposed else K))
    call = counting([], transposed, nested_rows=8)
    want = x @ (dense(w).T if transposed else dense(w))

    def put(a, spec):
        return jax.device_put(a, NamedSharding(mesh, spec))

    args = put(x, rows), put(codes, spec), put(scales, spec), *put((codebook, *nested), P())
    run = jax.jit(call).lower(*args).compile()
    np.testing.assert_allclose(run(*args), want, rtol=1e-5, atol=1e-3)
    # Gathered is the weight in 4 bits if anything; never its dense form, nor wide scales.
    gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", run.as_text())
    wide = {f"{K},{N}", f"{N},{K}"} | ({f"{K // 64},{N}"} if double_quant else set())
    assert not [shape for dtype, shape in gathered if dtype != "u8" and shape in wide]
    if place == "FSDP, along K" and not transposed:
        assert ("u8", f"{K // 2},{N}") in gathered


def test_parts_are_added_in_fp32():
    """Tensor parallel along K with a bf16 result: rounded once, after the sum."""
    mesh = Mesh(np.array(jax.devices()), ("model",))
    w = quantized(double_quant=False)
    x = jax.random.normal(jax.random.key(0), (32, K), jnp.bfloat16)
    call = functools.partial(counting([]), out_dtype=jnp.bfloat16)
    codes, scales, codebook = arrays(w)
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, P("model", None)))
    got = jax.jit(call)(x, put(codes), put(scales), codebook)
    exact = np.asarray(x, np.float64) @ np.asarray(dense(w).astype(jnp.bfloat16), np.float64)
    # Half a unit in the last place of bf16, and the sums' own fp32 errors.
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8 * 1.01, atol=1e-4)
