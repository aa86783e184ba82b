"""Choosing an implementation; what vmap and meshes do to a kernel that XLA cannot look into."""

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
from qlora_jax.quant.kernel_call import kernel_call
from qlora_jax.quant.matmul import nf4_matmul, nf4_matmul_transposed

K, N = 512, 256


def quantized(n: int = N, seed: int = 0) -> qj.QuantizedArray:
    return qj.quantize(jax.random.normal(jax.random.key(seed), (K, n)), qj.NF4())


def test_backends_name_every_implementation():
    found = qj.backends()
    assert set(found) == set(implementations.IMPLEMENTATIONS)
    assert found["xla"] == "available"
    assert found["pallas_tpu"] == "this process has no TPU"


def test_what_is_not_here_is_refused_by_name():
    x = jnp.ones((2, K))
    with pytest.raises(
        qj.QloraError, match="'pallas_tpu' is not available: this process has no TPU"
    ):
        nf4_matmul(x, quantized(), implementation="pallas_tpu")
    with pytest.raises(qj.QloraError, match="expected one of xla, pallas_tpu"):
        nf4_matmul(x, quantized(), implementation="triton")  # type: ignore[arg-type]
    with (
        qj.use_implementation("pallas_tpu"),
        pytest.raises(qj.QloraError, match="takes bfloat16 or float32, got float16"),
    ):
        nf4_matmul(x.astype(jnp.float16), quantized())


@pytest.mark.parametrize("product", [nf4_matmul, nf4_matmul_transposed])
def test_the_kernel_and_its_gradient_mean_what_xla_means(product):
    w = quantized(K)
    x = jax.random.normal(jax.random.key(1), (2, 3, K))

    def loss(x):
        return jnp.sum(jnp.sin(product(x, w, precision="highest")))

    want = jax.value_and_grad(loss)(x)
    with pltpu.force_tpu_interpret_mode(), qj.use_implementation("pallas_tpu"):
        got = jax.value_and_grad(loss)(x)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
    np.testing.assert_allclose(got[1], want[1], atol=2e-4)


def counting(calls: list[tuple[int, ...]], transposed: bool = False):
    plain = reference.nf4_matmul_transposed if transposed else reference.nf4_matmul

    def kernel(x, codes, scales, codebook, out_dtype, precision):
        calls.append(x.shape)
        return plain(x, codes, scales, codebook, out_dtype, precision)

    return kernel_call(kernel, transposed=transposed)


def arrays(w: qj.QuantizedArray):
    return w.codes, w.absmax(), jnp.linspace(-1, 1, 16)


def test_a_batch_of_inputs_folds_into_rows():
    calls: list[tuple[int, ...]] = []
    call = counting(calls)
    weight = arrays(quantized())
    x = jax.random.normal(jax.random.key(0), (3, 5, 4, K))
    run = jax.vmap(jax.vmap(lambda x: call(x, *weight, jnp.float32, None)))
    got = jax.jit(run)(x)
    assert set(calls) == {(4, K), (20, K), (60, K)}  # traced for one, for five, run for sixty
    np.testing.assert_allclose(
        got, reference.nf4_matmul(x.reshape(-1, K), *weight, jnp.float32).reshape(3, 5, 4, N),
        atol=1e-4,
    )  # fmt: skip


def test_a_weight_for_each_input():
    call = counting([])
    ws = [arrays(quantized(seed=i)) for i in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *ws)
    x = jax.random.normal(jax.random.key(0), (3, 4, K))
    got = jax.vmap(lambda x, *w: call(x, *w, jnp.float32, None))(x, *stacked)
    for i, w in enumerate(ws):
        want = reference.nf4_matmul(x[i], *w, jnp.float32)
        np.testing.assert_allclose(got[i], want, atol=1e-4)


PLACES = {
    "FSDP, along K": (P("data", None), P("data", None)),
    "FSDP, along N": (P("data", None), P(None, "data")),
    "tensor parallel, along N": (P("data", None), P(None, "model")),
    "tensor parallel, along K": (P("data", None), P("model", None)),
    "all devices, along K": (P(None, None), P(("data", "model"), None)),
    "both axes": (P(("data", "model"), None), P("data", "model")),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_on_a_mesh(place, transposed):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    rows, spec = PLACES[place]
    codes, scales, codebook = arrays(quantized())
    x = jax.random.normal(jax.random.key(0), (32, N if transposed else K))
    call = counting([], transposed)
    plain = reference.nf4_matmul_transposed if transposed else reference.nf4_matmul
    want = plain(x, codes, scales, codebook, jnp.float32)

    def put(a, spec):
        return jax.device_put(a, NamedSharding(mesh, spec))

    args = put(x, rows), put(codes, spec), put(scales, spec), put(codebook, P())
    run = jax.jit(lambda *args: call(*args, jnp.float32, None)).lower(*args).compile()
    np.testing.assert_allclose(run(*args), want, rtol=1e-5, atol=1e-3)
    # Gathered is the weight in 4 bits if anything; never its dense form.
    gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", run.as_text())
    dense = {f"{K},{N}", f"{N},{K}"}
    assert not [shape for dtype, shape in gathered if dtype != "u8" and shape in dense]
    if place == "FSDP, along K" and not transposed:
        assert ("u8", f"{K // 2},{N}") in gathered
