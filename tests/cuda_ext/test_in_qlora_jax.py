"""The CUDA kernels where users meet them: in nf4_matmul, on a mesh, in a model."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qlora_cuda
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from qlora_cuda import library

import qlora_jax as qj
from qlora_jax import lora, models
from qlora_jax.models import LlamaConfig
from qlora_jax.quant.matmul import nf4_matmul

K, N = 256, 192


def weight(config=None):
    w = jax.random.normal(jax.random.key(0), (K, N), jnp.bfloat16)
    return qj.quantize(w, config or qj.NF4())


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("config", [qj.NF4(), qj.FP4(32, False)], ids=str)
@pytest.mark.parametrize("m", [3, 40, 130])
def test_product_and_gradient(m, config):
    w = weight(config)
    x = jax.random.normal(jax.random.key(1), (m, K), jnp.bfloat16)

    g = jax.random.normal(jax.random.key(2), (m, N))

    def both(x):
        y, pullback = jax.vjp(lambda x: nf4_matmul(x, w, out_dtype=jnp.float32), x)
        return y, *pullback(g)

    want = jax.jit(both)(x)
    with qj.use_implementation("cuda"):
        # A function of its own: jit would return the program that it has already.
        got = jax.jit(lambda x: both(x))(x)
    for a, b in zip(got, want, strict=True):
        # Of a deviation of 16 and 14: five times that of the rounding of levels and of W to bf16.
        np.testing.assert_allclose(*(np.asarray(v, np.float32) for v in (a, b)), atol=0.15)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_vmap_reads_the_weight_once_for_all():
    w = weight()
    x = jax.random.normal(jax.random.key(1), (4, 3, K), jnp.bfloat16)
    with qj.use_implementation("cuda"):
        run = jax.jit(jax.vmap(lambda x: nf4_matmul(x, w)))
        text = run.lower(x).as_text()
        got = run(x)
    assert text.count("@qlora_matmul(") == 1 and "tensor<12x256xbf16>" in text
    want = nf4_matmul(x, w, out_dtype=jnp.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2**-7, atol=0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.skipif(jax.device_count() < 8, reason="a mesh of eight devices")
@pytest.mark.parametrize("m", [8, 64, 512])
def test_on_a_mesh(m):
    """Up to 16 rows a device, double-quantized scales are found by their place; from 128 on, the
    weight is written dense."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    w = weight()
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
    placed = jax.tree.map(lambda a: put(a, *[None] * a.ndim), w)
    placed = type(w)(**{
        **vars(placed),
        "codes": put(w.codes, "model", None),
        "scales": put(w.scales, "model", None),
    })  # fmt: skip
    x = put(jax.random.normal(jax.random.key(1), (m, K), jnp.bfloat16), "data", "model")
    want = nf4_matmul(x, w, out_dtype=jnp.float32)
    with qj.use_implementation("cuda"):
        got = jax.jit(lambda x, w: nf4_matmul(x, w, out_dtype=jnp.float32))(x, placed)
    np.testing.assert_allclose(got, want, atol=0.3)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_a_model():
    config = LlamaConfig.from_hf(
        {
            "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    params = models.init_params(config, jax.random.key(0))
    frozen = qj.quantize_tree(params, qj.NF4())
    adapters = lora.init(jax.random.key(1), frozen, qj.LoraConfig(rank=4))
    ids = jnp.arange(18).reshape(2, 9)

    def gradient():
        def loss(adapters):
            fn = qj.lift(
                lambda p, ids: models.apply(config, p, ids, dtype=jnp.bfloat16)[0], strict=True
            )
            return jnp.sum(fn(lora.attach(frozen, adapters), ids) ** 2)

        return jax.jit(jax.value_and_grad(loss))(adapters)

    want = gradient()
    with qj.use_implementation("cuda"):
        got = gradient()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, atol=0.05 * scale + 1e-30)


@pytest.mark.parametrize(
    ("built", "found", "reason"),
    [
        ((0, 3), (0, 3), None),
        ((0, 1), (0, 3), None),
        ((0, 4), (0, 3), "built for version 0.4 of XLA's FFI, this jaxlib .* has 0.3: build it"),
        ((0, 3), (1, 0), "built for version 0.3 of XLA's FFI, this jaxlib .* has 1.0"),
    ],
)
def test_versions(built, found, reason):
    import re

    got = library.mismatch(built, found)
    assert got is None if reason is None else re.search(reason, got)


@pytest.mark.slow
def test_it_is_built_for_what_is_installed(kernels):
    assert library.built_for(kernels) == library.installed()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "kind", "capability", "reason"),
    [
        ("gpu", "Tesla T4", "7.5", None),
        ("gpu", "NVIDIA B200", "10.0", None),
        ("gpu", "Tesla V100", "7.0", "it needs compute capability 7.5, this Tesla V100 has 7.0"),
        ("gpu", "MI300X", "gfx942", "it needs an NVIDIA GPU, the default device is a MI300X"),
        ("cpu", "cpu", None, "it needs an NVIDIA GPU, the default device is a cpu"),
    ],
)
def test_unavailable(platform, kind, capability, reason, kernels, monkeypatch):
    device = types.SimpleNamespace(
        platform=platform, device_kind=kind, compute_capability=capability
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(library, "PATH", kernels)
    monkeypatch.setattr(library, "register", lambda path: None)
    assert qlora_cuda.unavailable.__wrapped__() == reason


def test_what_a_gpu_multiplies(monkeypatch):
    device = types.SimpleNamespace(platform="gpu", compute_capability="7.5")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert qlora_cuda.unsupported(64, 64, 64, jnp.float16) is None
    assert "multiplies float16 only" in qlora_cuda.unsupported(64, 64, 64, jnp.bfloat16)


@pytest.mark.parametrize(
    ("k", "n", "block", "dtype", "message"),
    [
        (128, 128, 64, jnp.float32, "x must be bfloat16 or float16, got float32"),
        (96, 128, 32, jnp.bfloat16, "K must be a multiple of 64 and N one of 16, got K=96 x N=128"),
        (128, 40, 64, jnp.bfloat16, "got K=128 x N=40"),
        (128, 48, 16, jnp.bfloat16, "block_size must be a power of two from 32 to 4096, got 16"),
    ],
)
def test_what_it_does_not_take(k, n, block, dtype, message):
    assert message in qlora_cuda.unsupported(k, n, block, dtype)
    assert qlora_cuda.unsupported(128, 48, 64, jnp.bfloat16) is None
