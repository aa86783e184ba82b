"""Initial values, attaching, merging, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.lora import LoraWeights

L, K, N, R = 3, 128, 96, 4
KERNEL, TABLE = "layers/up/kernel", "embed_tokens/embedding"


def tree(dtype=jnp.float32, quantized=False):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "layers": {"up": {"kernel": jax.random.normal(keys[0], (L, K, N), dtype)}},
        "head": {"kernel": jax.random.normal(keys[1], (K, N), dtype)},
        "embed_tokens": {"embedding": jax.random.normal(keys[2], (50, K), dtype)},
    }
    return qj.quantize_tree(params, qj.NF4()) if quantized else params


def weights(scaling=2.0):
    a = jax.random.normal(jax.random.key(3), (L, K, R))
    b = jax.random.normal(jax.random.key(4), (L, R, N)) / 8
    return {KERNEL: LoraWeights(a, b, scaling)}


def oracle(base, w: LoraWeights):
    a, b, w64 = (np.asarray(x, np.float64) for x in (w.a, w.b, base))
    scaling = np.broadcast_to(np.asarray(w.scaling, np.float64), (L,))
    return w64 + scaling[:, None, None] * np.einsum("lkr,lrn->lkn", a, b)


def test_initial_values():
    config = qj.LoraConfig(rank=R, targets=("up", "embed_tokens"))
    found = qj.lora.init(jax.random.key(0), tree(), config)
    up, table = found[KERNEL], found[TABLE]
    assert up.a.shape == (L, K, R) and up.b.shape == (L, R, N)
    assert not up.b.any() and not table.a.any()
    # Kaiming-uniform with a = sqrt 5 over K inputs: U(-1/sqrt K, 1/sqrt K).
    bound = K**-0.5
    assert float(jnp.abs(up.a).max()) <= bound
    assert float(jnp.std(up.a)) == pytest.approx(bound / 3**0.5, rel=0.05)
    # 512 draws: a standard deviation is known to one part in 30 or so.
    assert float(jnp.std(table.b)) == pytest.approx(1.0, rel=0.15)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    merged = qj.lora.merge(tree(), found)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), merged, tree()))


def test_an_adapter_does_not_depend_on_the_others():
    alone = qj.lora.init(jax.random.key(0), tree(), qj.LoraConfig(targets=("up",)))
    both = qj.lora.init(jax.random.key(0), tree(), qj.LoraConfig(targets=("up", "embed_tokens")))
    other = qj.lora.init(jax.random.key(1), tree(), qj.LoraConfig(targets=("up",)))
    assert (alone[KERNEL].a == both[KERNEL].a).all()
    assert (alone[KERNEL].a != other[KERNEL].a).any()


def test_several_axes_on_a_side():
    """[D, H, Dh] read as one contracted and two output axes, dense and quantized."""
    kernel = jax.random.normal(jax.random.key(0), (64, 4, 8))
    axes = {".*": (1, 2)}
    for params in (
        {"q": {"kernel": kernel}},
        qj.quantize_tree({"q": {"kernel": kernel}}, qj.NF4(), qj.Policy(axes=axes)),
    ):
        found = qj.lora.init(jax.random.key(0), params, qj.LoraConfig(rank=R), axes=axes)
        w = found["q/kernel"]
        assert w.a.shape == (64, R) and w.b.shape == (R, 4, 8)
        w = LoraWeights(w.a, w.b + 1, w.scaling)
        dense = qj.lora.merge(params, {"q/kernel": w})["q"]["kernel"]
        base = params["q"]["kernel"]
        base = base.dequantize() if isinstance(base, qj.QuantizedArray) else base
        expected = base + w.scaling * jnp.einsum("kr,rhd->khd", w.a, w.b)
        np.testing.assert_allclose(dense, expected, rtol=0, atol=1e-5)


def test_attaching_lists_all_that_does_not_fit():
    wrong = {
        "nowhere/kernel": LoraWeights(jnp.ones((K, R)), jnp.ones((R, N)), 1.0),
        KERNEL: LoraWeights(jnp.ones((L, K, R)), jnp.ones((L, R + 1, N)), 1.0),
        "head/kernel": jnp.ones((K, N + 1)),
        TABLE: LoraWeights(jnp.ones((50, R)), jnp.ones((R, K)), (1.0, 2.0)),
    }
    with pytest.raises(qj.QloraError) as error:
        qj.lora.attach(tree(), wrong)
    text = str(error.value)
    assert all(path in text for path in wrong)
    assert "no such parameter" in text and "do not multiply" in text and "in full as" in text
    with pytest.raises(qj.QloraError, match="already has an adapter"):
        qj.lora.attach(qj.lora.attach(tree(), weights()), weights())
    with pytest.raises(qj.QloraError, match="dropout needs a key"):
        qj.lora.attach(tree(), weights(), dropout=0.1)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_attaching_with_an_impossible_dropout_is_refused(dropout):
    with pytest.raises(qj.QloraError, match=r"dropout must be in \[0, 1\)"):
        qj.lora.attach(tree(), weights(), dropout=dropout, key=jax.random.key(0))


@pytest.mark.parametrize("scaling", [2.0, (2.0, 0.0, -1.0)], ids=["one", "by layer"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_merging_is_one_rounding_of_the_exact_sum(dtype, quantized, scaling):
    params, adapters = tree(dtype, quantized), weights(scaling)
    base = params["layers"]["up"]["kernel"]
    if quantized:
        base = base.dequantize(jnp.float32)
    exact = oracle(base.astype(jnp.float32), adapters[KERNEL])
    merged = qj.lora.merge(params, adapters)["layers"]["up"]["kernel"]
    assert merged.dtype == dtype
    # Half a step of the dtype, and fp32 sums of R + 1 terms of size up to about 10.
    step = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-24
    np.testing.assert_allclose(
        np.asarray(merged, np.float64), exact, rtol=1.01 * step, atol=10 * (R + 1) * 2.0**-24
    )


def test_unmerging_takes_the_adapter_out_again():
    merged = qj.lora.merge(tree(), weights())
    again = qj.lora.unmerge(merged, weights())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), again, tree())
    with pytest.raises(qj.QloraError, match="is quantized"):
        qj.lora.unmerge(tree(quantized=True), weights())


def test_what_was_trained_in_full_is_merged_in_its_own_type():
    params = tree(jnp.bfloat16)
    config = qj.LoraConfig(rank=R, targets=("up",), modules_to_save=("embed_tokens",))
    adapters = qj.lora.init(jax.random.key(0), params, config)
    assert adapters[TABLE].dtype == jnp.float32
    merged = qj.lora.merge(params, adapters)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(qj.QloraError, match=f"{TABLE} was trained in full"):
        qj.lora.unmerge(merged, adapters)


def test_the_error_of_merging_is_reported():
    params, original = tree(quantized=True), tree()
    base = params["layers"]["up"]["kernel"].dequantize(jnp.float32)
    trained = oracle(base, weights()[KERNEL])
    for against in (None, original):
        errors = qj.lora.merge_errors(params, weights(), jnp.bfloat16, against)
        assert set(errors) == {KERNEL, "head/kernel"}  # the embedding is neither 4-bit nor trained
        target = (
            trained
            if against is None
            else oracle(original["layers"]["up"]["kernel"], weights()[KERNEL])
        )
        rounded = np.asarray(jnp.asarray(target, jnp.bfloat16), np.float64)
        expected = np.linalg.norm(rounded - trained) / np.linalg.norm(trained)
        assert errors[KERNEL] == pytest.approx(expected, rel=0.02)
    assert errors[KERNEL] > 0.05, "NF4's own error shows when the original is the base"


def test_the_error_of_merging_counts_weights_trained_in_full():
    table = jax.random.normal(jax.random.key(5), (50, K))
    params = tree(quantized=True) | {"bias": jnp.ones(N)}
    adapters = weights() | {TABLE: table, "bias": jnp.zeros(N)}
    errors = qj.lora.merge_errors(params, adapters, jnp.bfloat16)
    assert set(errors) == {KERNEL, "head/kernel", TABLE, "bias"}
    exact = np.asarray(table, np.float64)
    rounded = np.asarray(table.astype(jnp.bfloat16), np.float64)
    expected = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert errors[TABLE] == pytest.approx(expected, rel=1e-3)
    assert errors["bias"] == 0
    assert qj.lora.merge_errors(params, adapters, jnp.float32)[TABLE] == 0
