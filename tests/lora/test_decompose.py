"""PiSSA and LoftQ: what the base and the adapters are, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from tests.lora.test_adapters import KERNEL, tree

KEY = jax.random.key(0)
R = 8


def config(init: str, **settings) -> qj.LoraConfig:
    return qj.LoraConfig(rank=R, alpha=4 * R, targets=("up",), init=init, **settings)


def sums(params, adapters) -> np.ndarray:
    """base + scaling * A B of every layer."""
    return np.asarray(qj.lora.merge(params, adapters)["layers"]["up"]["kernel"], np.float64)


def test_pissa_takes_the_largest_singular_values_out():
    params, adapters = qj.lora.init_quantized(KEY, tree(), config("pissa"), None)
    w = np.asarray(tree()["layers"]["up"]["kernel"], np.float64)
    np.testing.assert_allclose(sums(params, adapters), w, rtol=0, atol=1e-5)
    rest = np.asarray(params["layers"]["up"]["kernel"], np.float64)
    for before, after in zip(w, rest, strict=True):
        values = np.linalg.svd(before, compute_uv=False)
        left = np.linalg.svd(after, compute_uv=False)
        np.testing.assert_allclose(left[: len(values) - R], values[R:], rtol=1e-4, atol=1e-4)
    # A and B have equal shares of them.
    a, b = adapters[KERNEL].a[0], adapters[KERNEL].b[0]
    np.testing.assert_allclose(a.T @ a, b @ b.T, rtol=0, atol=1e-4)


def test_pissa_by_iteration_takes_out_nearly_as_much():
    """Of a weight whose singular values fall, as those of trained ones do."""
    u, _, vh = np.linalg.svd(np.asarray(tree()["head"]["kernel"]), full_matrices=False)
    w = jnp.asarray((u * 0.9 ** np.arange(len(vh))) @ vh, jnp.float32)
    left = {}
    for init in ("pissa", "pissa_niter_4"):
        params, _ = qj.lora.init_quantized(KEY, {"up": {"kernel": w}}, config(init), None)
        left[init] = float(jnp.linalg.norm(params["up"]["kernel"]))
    assert left["pissa"] <= left["pissa_niter_4"] < 1.01 * left["pissa"]


def test_quantizing_what_pissa_leaves_loses_less():
    """It is smaller, and that is what the 4 bits are spent on; likewise loftq, and more rounds."""
    w = np.asarray(tree()["layers"]["up"]["kernel"], np.float64)
    plain = qj.lora.merge(tree(quantized=True), {})["layers"]["up"]["kernel"]
    lost = [np.linalg.norm(np.asarray(plain, np.float64) - w)]
    for settings in (config("pissa"), config("loftq"), config("loftq", loftq_iter=4)):
        params, adapters = qj.lora.init_quantized(KEY, tree(), settings, qj.NF4())
        assert isinstance(params["layers"]["up"]["kernel"], qj.QuantizedArray)
        lost.append(np.linalg.norm(sums(params, adapters) - w))
    without, pissa, loftq, rounds = lost
    assert pissa < without and rounds < loftq < without


def test_the_rest_of_the_tree_is_quantized_as_ever():
    params, adapters = qj.lora.init_quantized(KEY, tree(), config("loftq"), qj.NF4())
    expected = tree(quantized=True)
    for name in ("head", "embed_tokens"):
        assert jax.tree.all(
            jax.tree.map(lambda x, y: bool((x == y).all()), params[name], expected[name])
        )
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert set(adapters) == {KERNEL}


def test_several_axes_on_a_side_and_magnitudes():
    kernel = jax.random.normal(KEY, (2, 64, 4, 8))
    policy = qj.Policy(axes={".*": (1, 2)})
    params, adapters = qj.lora.init_quantized(
        KEY, {"up": {"kernel": kernel}}, config("pissa", dora=True), qj.NF4(), policy=policy
    )
    assert params["up"]["kernel"].shape == kernel.shape
    weights = adapters["up/kernel"]
    assert weights.a.shape == (2, 64, R) and weights.b.shape == (2, R, 4, 8)
    merged = qj.lora.merge(params, adapters)["up"]["kernel"]
    np.testing.assert_allclose(
        weights.magnitude, np.linalg.norm(np.asarray(merged), axis=1), rtol=1e-5
    )
    assert np.linalg.norm(merged - kernel) < 0.1 * np.linalg.norm(kernel)


@pytest.mark.parametrize(
    ("params", "settings", "message"),
    [
        (tree(), config("default"), "use quantize_tree and init"),
        (tree(quantized=True), config("pissa"), f"{KERNEL} is quantized already"),
        (
            tree(),
            qj.LoraConfig(targets=("embed_tokens",), init="pissa"),
            "embedding: init 'pissa' is of linear layers only",
        ),
        (tree(), qj.LoraConfig(rank=97, targets=("up",), init="pissa"), "no 97 singular values"),
    ],
)
def test_what_cannot_be(params, settings, message):
    with pytest.raises(qj.QloraError, match=message):
        qj.lora.init_quantized(KEY, params, settings, qj.NF4())


def test_loftq_without_quantization_and_init_with_a_base_to_change():
    with pytest.raises(qj.QloraError, match="stays dense, so that loftq has nothing"):
        qj.lora.init_quantized(KEY, tree(), config("loftq"), None)
    with pytest.raises(qj.QloraError, match="give those to lora.init_quantized"):
        qj.lora.init(KEY, tree(), config("loftq"))
