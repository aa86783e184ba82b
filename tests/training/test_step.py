"""The train step: what it computes, what it leaves alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as qj
from qlora_jax.data import batches
from tests.training import models

ALL = qj.LoraConfig(rank=4, alpha=8)
# Two of seven modules: most of a test's time goes into compiling, which adapters add to.
CONFIG = qj.LoraConfig(rank=4, alpha=8, targets=("q_proj", "down_proj"))
pytestmark = pytest.mark.standard_promotion  # optax.adamw


def batch(size: int = 4) -> dict[str, Any]:
    return next(batches(models.dataset(), size, seed=0, sequence_length=32))


def state(optimizer: Any, config: qj.LoraConfig = CONFIG, key: Any = None) -> qj.TrainState:
    """With B other than zero, so that every gradient is there."""
    adapters = qj.lora.init(jax.random.key(1), models.model().params, config)
    adapters = jax.tree.map(lambda x: x + 0.02, adapters)
    return qj.TrainState.create(adapters, optimizer, key)


def close(a: Any, b: Any, tolerance: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


def test_it_learns_and_leaves_the_base_alone():
    model, optimizer = models.model(), optax.adamw(1e-2)
    before = jax.tree.map(jnp.copy, model.params)
    step, s, losses = qj.make_train_step(model.loss, optimizer), state(optimizer, ALL), []
    for _ in range(20):
        s, metrics = step(s, model.params, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert int(s.step) == 20
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), before, model.params))


def test_one_step_is_optax_on_the_mean_loss():
    """Against the gradient of the plain mean loss over labelled tokens, clipped by optax."""
    model, clip = models.model(), 0.05
    optimizer = optax.sgd(1.0)
    s = state(optimizer, ALL)
    start = jax.tree.map(jnp.copy, s.adapters)

    def mean_loss(adapters: Any) -> Any:
        logits, _ = model.apply(
            qj.lora.attach(model.params, adapters),
            batch()["input_ids"],
            attention_mask=batch()["attention_mask"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], jnp.maximum(batch()["labels"][:, 1:], 0)
        ).mean(where=batch()["labels"][:, 1:] != -100)

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(start)
    clipped, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
    s, metrics = qj.make_train_step(model.loss, optimizer, max_grad_norm=clip)(
        s, model.params, batch()
    )
    # fp32: losses near 4 and 30 tokens summed in another order.
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert float(metrics["grad_norm"]) > clip
    assert float(metrics["tokens"]) == float(np.sum(batch()["labels"][:, 1:] != -100))
    close(s.adapters, jax.tree.map(lambda x, g: x - g, start, clipped))


def test_accumulated_micro_batches_are_one_batch():
    """Also where they have different numbers of labels."""
    model, optimizer = models.model(), optax.sgd(1.0)
    whole = batch(4)
    whole["labels"][0, 3:] = -100
    parts = jax.tree.map(lambda x: x.reshape(2, 2, -1), whole)
    one, metrics_one = qj.make_train_step(model.loss, optimizer)(
        state(optimizer), model.params, whole
    )
    two, metrics_two = qj.make_train_step(model.loss, optimizer, accumulate=2)(
        state(optimizer), model.params, parts
    )
    close(one.adapters, two.adapters)
    close(metrics_one, metrics_two, 1e-5)
    with pytest.raises(qj.QloraError, match=r"expects batch leaves \[2, B"):
        qj.make_train_step(model.loss, optimizer, accumulate=2)(
            state(optimizer), model.params, whole
        )


def test_dropout_is_new_at_every_step_and_repeatable():
    model, optimizer = models.model(), optax.sgd(0.0)
    step = qj.make_train_step(model.loss, optimizer, dropout=0.5)

    def losses(key: int) -> list[float]:
        s, found = state(optimizer, key=jax.random.key(key)), []
        for _ in range(3):
            s, metrics = step(s, model.params, batch())
            found.append(float(metrics["loss"]))
        return found

    first = losses(0)
    assert len(set(first)) == 3, "the parameters do not move, so only dropout can differ"
    assert first == losses(0)
    assert first != losses(1)


def test_an_impossible_dropout_is_refused():
    with pytest.raises(qj.QloraError, match=r"dropout must be in \[0, 1\), got 1.0"):
        qj.make_train_step(models.model().loss, optax.sgd(1.0), dropout=1.0)


def test_the_state_is_donated():
    model, optimizer = models.model(), optax.adamw(1e-2)
    s = state(optimizer)
    qj.make_train_step(model.loss, optimizer)(s, model.params, batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(s.adapters))


def test_slips_are_named():
    model, optimizer = models.model(), optax.sgd(0.0)
    s, ids = state(optimizer), batch()["input_ids"]

    def taken(loss: Any, given: Any) -> None:
        qj.make_train_step(loss, optimizer)(s, model.params, given)

    with pytest.raises(qj.QloraError, match=r"needs \['labels'\]; it has \['input_ids'\]"):
        taken(model.loss, {"input_ids": ids})
    with pytest.raises(qj.QloraError, match=r"arrays \[B, ...\], this one has 4 scalars"):
        taken(model.loss, {"input_ids": [1, 2], "labels": [1, 2]})
    with pytest.raises(qj.QloraError, match="must return two scalars"):
        taken(lambda params, batch: model.loss(params, batch)[0], batch())
    with pytest.raises(qj.QloraError, match="must return two scalars"):
        taken(lambda params, batch: model.apply(params, batch["input_ids"]), batch())


def test_dropout_and_an_optimizer_of_the_whole_tree():
    model, optimizer = models.model(), qj.freeze_base(optax.sgd(1.0))
    adapters = qj.lora.init(jax.random.key(1), model.params, CONFIG)
    tree = qj.lora.attach(model.params, adapters, dropout=0.5, key=jax.random.key(0))
    with pytest.raises(qj.QloraError, match="holds the key of a dropout"):
        optimizer.update(tree, optimizer.init(tree), tree)


def test_a_gpu_gets_options_that_this_jax_knows(monkeypatch):
    """A CPU's compiler reads them too, and does nothing about them."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model, optimizer = models.model(), optax.sgd(0.0)
    s = state(optimizer)
    evaluate, step = qj.make_eval_step(model.loss), qj.make_train_step(model.loss, optimizer)
    evaluate(s.adapters, model.params, batch())
    for stepping in (evaluate, step):
        start = s.adapters if stepping is evaluate else s
        with pytest.raises(ValueError, match="xla_gpu_enable_triton_gemm"):
            jax.jit(stepping)(start, model.params, batch())
    bare = qj.make_train_step(model.loss, optimizer, compiler_options={})
    jax.jit(bare).lower(s, model.params, batch())


def test_evaluation_is_the_loss():
    model = models.model()
    adapters = state(optax.sgd(0.0)).adapters
    total, tokens = qj.make_eval_step(model.loss)(adapters, model.params, batch())
    expected = jax.jit(model.loss)(qj.lora.attach(model.params, adapters), batch())
    np.testing.assert_allclose(total / tokens, expected[0] / expected[1], rtol=1e-6)


def test_loops_of_ones_own_get_the_same_update():
    """The mask with a cut tree, and the optax mask over the whole tree, beside the train step."""
    model, optimizer = models.model(), optax.adamw(1e-2)
    config = qj.LoraConfig(rank=4, targets=("q_proj",), modules_to_save=("norm",))
    s = state(optimizer, config)
    tree = qj.lora.attach(model.params, jax.tree.map(jnp.copy, s.adapters))

    def mean(tree: Any) -> Any:
        total, tokens = model.loss(tree, batch())
        return total / tokens

    s, _ = qj.make_train_step(model.loss, optimizer)(s, model.params, batch())

    mask = qj.trainable_mask(tree, also=("norm/scale",))
    trainable, frozen = qj.partition(tree, mask)
    grads = jax.jit(jax.grad(lambda t: mean(qj.combine(t, frozen))))(trainable)
    updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable)
    cut = qj.combine(optax.apply_updates(trainable, updates), frozen)

    whole = qj.freeze_base(optimizer, also=("norm/scale",))
    start = whole.init(tree)
    assert sum(x.size for x in jax.tree.leaves(start)) < 3 * qj.lora.count(s.adapters) + 3
    updates, _ = whole.update(jax.jit(jax.grad(mean, allow_int=True))(tree), start, tree)
    masked = optax.apply_updates(tree, updates)

    for found in (cut, masked):
        q = found["layers"]["self_attn"]["q_proj"]["kernel"]
        ours = s.adapters["layers/self_attn/q_proj/kernel"]
        close((q.a, q.b, found["norm"]["scale"]), (ours.a, ours.b, s.adapters["norm/scale"]))
        base = tree["layers"]["self_attn"]["q_proj"]["kernel"].base
        assert (q.base.codes == base.codes).all()
    with pytest.raises(KeyError, match="nothing"):
        qj.trainable_mask(tree, also=("nothing",))


def test_copies_take_the_place_of_adapters_that_nobody_else_holds(monkeypatch):
    """At no time are there two of more than one."""
    shape, counts, copy = (1, 3, 5, 7), [], jnp.array  # of no other test

    def counting(x):
        counts.append(sum(x.shape == shape for x in jax.live_arrays()))
        return copy(x)

    monkeypatch.setattr(jnp, "array", counting)
    state = qj.TrainState.create({f"{i}": jnp.ones(shape) for i in range(4)}, optax.sgd(0.1))
    assert len(state.adapters) == 4 and counts[:4] == [4] * 4
