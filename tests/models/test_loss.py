"""The chunked loss beside optax on whole logits, values and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.checkpoints.encoder import EncoderModel
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.seq2seq import Seq2SeqModel
from qlora_jax.errors import QloraError
from qlora_jax.models import init_params, read_config
from qlora_jax.models.logits import logits
from qlora_jax.models.loss import causal_lm_loss

B, T, D, V = 3, 7, 16, 40


def problem(ignored: float):
    keys = jax.random.split(jax.random.key(0), 4)
    table = {"w": jax.random.normal(keys[0], (V, D)), "scale": jnp.ones((), jnp.float32)}
    hidden = jax.random.normal(keys[1], (B, T, D))
    labels = jax.random.randint(keys[2], (B, T), 0, V)
    return table, hidden, jnp.where(jax.random.uniform(keys[3], (B, T)) < ignored, -100, labels)


def head(table, rows):
    return table["scale"] * rows @ table["w"].T


def whole(table, hidden, labels):
    targets = labels[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        head(table, hidden[:, :-1]), jnp.maximum(targets, 0)
    )
    return jnp.sum(losses, where=targets != -100)


reference = jax.jit(jax.value_and_grad(whole, (0, 1)))


@pytest.mark.parametrize(("chunk", "parts"), [(1, 1), (4, 1), (256, 1), (4, 3), (4, 2)])
@pytest.mark.parametrize("ignored", [0.0, 0.6, 1.0])
def test_value_and_gradients(chunk, parts, ignored):
    """parts: of examples on several devices, each with as many labels as it happens to have."""
    table, hidden, labels = problem(ignored)

    def ours(table, hidden):
        total, count = causal_lm_loss(head, table, hidden, labels, chunk=chunk, parts=parts)
        return 2 * total, count

    (total, count), grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(table, hidden)
    expected, expected_grads = reference(table, hidden, labels)
    assert float(count) == float(jnp.sum(labels[:, 1:] != -100))
    # fp32 sums of at most 18 losses near 10, in another order.
    np.testing.assert_allclose(total, 2 * expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=2e-6, atol=2e-5),
        grads,
        expected_grads,
    )


def test_what_is_not_differentiated_costs_no_gradient():
    """The table's gradient, V x D and by far the largest, is not in the program."""
    table, hidden, labels = problem(0.3)
    jaxpr = jax.make_jaxpr(
        jax.grad(lambda hidden: causal_lm_loss(head, table, hidden, labels, chunk=4)[0])
    )(hidden)
    zeros = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "broadcast_in_dim"]
    assert not [e for e in zeros if e.outvars[0].aval.shape == (V, D)]
    frozen = jax.grad(
        lambda scale: causal_lm_loss(head, {**table, "scale": scale}, hidden, labels, chunk=4)[0]
    )(table["scale"])
    expected = jax.grad(lambda s: whole({**table, "scale": s}, hidden, labels))(table["scale"])
    np.testing.assert_allclose(frozen, expected, rtol=1e-5)


def test_large_logits_do_not_overflow():
    table, hidden, labels = problem(0.0)
    total, _ = causal_lm_loss(head, table, 1e4 * hidden, labels)
    np.testing.assert_allclose(total, whole(table, 1e4 * hidden, labels), rtol=1e-5)
    assert np.isfinite(float(total))


@pytest.mark.parametrize("shape", [(B, T - 1), (B, T + 1), (B - 1, T), (T, B), (B * T,), (B, T, 1)])
def test_labels_of_another_shape_are_refused(shape):
    """(T, B) has as many labels as there are positions: they would meet the wrong ones."""
    table, hidden, _ = problem(0.0)
    with pytest.raises(QloraError) as caught:
        causal_lm_loss(head, table, hidden, jnp.zeros(shape, jnp.int32))
    assert str(hidden.shape) in str(caught.value) and str(shape) in str(caught.value)


def test_a_single_token_has_nothing_to_predict():
    table, hidden, labels = problem(0.0)
    with pytest.raises(QloraError, match="at least two tokens"):
        causal_lm_loss(head, table, hidden[:, :1], labels[:, :1])
    causal_lm_loss(head, table, hidden[:, :2], labels[:, :2])


TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MODELS = {
    "decoder, capped and tied": (
        Model,
        TINY | {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.5},
    ),
    "decoder with a head of its own": (Model, TINY | {"model_type": "llama"}),
    "encoder-decoder, tied": (
        Seq2SeqModel,
        {"model_type": "t5", "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24}
        | {"num_layers": 1, "num_heads": 2},
    ),
    "encoder": (
        EncoderModel,
        TINY | {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_has_the_gradient_of_whole_logits(kind):
    """The head's too, when all are trained: of whichever family, also where a table is both."""
    make, hf = MODELS[kind]
    config = read_config(hf)
    params = jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(0)))
    model = make(config, params, None, "tiny", jnp.float32)
    ids = jax.random.randint(jax.random.key(1), (2, 6), 2, 40)
    labels = ids.at[0, 2].set(-100)

    def whole(params):
        targets = labels
        if make is Seq2SeqModel:
            start = jnp.zeros_like(labels[:, :1])
            shifted = jnp.concatenate([start, labels[:, :-1]], axis=1)
            logits = model.apply(params, ids, jnp.maximum(shifted, 0))
        elif make is EncoderModel:
            logits = model.apply(params, ids)
        else:
            logits, targets = model.apply(params, ids)[0][:, :-1], labels[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        return jnp.sum(losses, where=targets != -100)

    def ours(params):
        return model.loss(params, {"input_ids": ids, "labels": labels})[0]

    found, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, whole))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_the_gradient_of_logits_is_multiplied_in_16_bits(axis):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (5, 6, D), jnp.bfloat16)
    w = jax.random.normal(keys[1], (D, V) if axis == 0 else (V, D), jnp.bfloat16)
    g = jax.random.normal(keys[2], (5, 6, V))
    plain = lambda x, w: jnp.einsum("btd,dv->btv", x, w if axis == 0 else w.T)  # noqa: E731
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, w))
    expected, pull = jax.vjp(plain, *wide)
    got, pull_ours = jax.vjp(lambda x, w: logits(x, w, axis), x, w)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    # g and the results are rounded to 8 bits; sums of V and of 30 products.
    for ours, theirs in zip(pull_ours(g), pull(g), strict=True):
        assert ours.dtype == jnp.bfloat16
        largest = float(jnp.max(jnp.abs(theirs)))
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=2**-7 * largest)
    products = [
        eqn
        for eqn in jax.make_jaxpr(lambda g: pull_ours(g))(g).eqns
        if eqn.primitive.name == "dot_general"
    ]
    assert len(products) == 2
    assert all(x.aval.dtype == jnp.bfloat16 for eqn in products for x in eqn.invars)


@pytest.mark.parametrize("kind", MODELS)
def test_the_head_multiplies_its_gradient_in_16_bits(kind):
    make, hf = MODELS[kind]
    config = read_config(hf | {"vocab_size": 41})  # no other length is
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    model = make(config, params, None, "", jnp.bfloat16)
    ids = jnp.arange(8, dtype=jnp.int32)[None]

    def loss(params):
        return model.loss(params, {"input_ids": ids, "labels": ids})[0]

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    factors = re.findall(r"dot_general .* : \(tensor<(\S+)>, tensor<(\S+)>\) -> ", text)
    of_head = [pair for pair in factors if any("41" in x.split("x") for x in pair)]
    assert len(of_head) >= 3 and all(x.endswith("bf16") for pair in of_head for x in pair), of_head


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_ids": jnp.arange(8)[None]}, "does not read; give segment_ids"),
        ({"input_ids": jnp.arange(8)}, r"integers \[B, T\], not int32 \(8,\)"),
        ({"input_ids": jnp.ones((1, 8), jnp.float32)}, r"not float32 \(1, 8\)"),
        ({"input_ids": [[1, 2]]}, "not list"),
    ],
)
def test_batches_that_a_decoder_cannot_read(changes, message):
    make, hf = MODELS["decoder with a head of its own"]
    model = make(read_config(hf), {}, None, "", jnp.float32)
    ids = jnp.arange(8, dtype=jnp.int32)[None]
    with pytest.raises(QloraError, match=message):
        model.loss({}, {"input_ids": ids, "labels": ids} | changes)
    if isinstance(changes.get("input_ids", ids), jax.Array):
        with pytest.raises(QloraError, match=message):
            jax.eval_shape(model.loss, {}, {"input_ids": ids, "labels": ids} | changes)
