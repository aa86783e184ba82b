"""The batches that a run trains on, and what packing them changes: nothing but the time."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.data import IGNORE, TokenizedDataset, TokenizedExample
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.stream import StepBatches
from tests.training import models


def token_losses(model, params, batch) -> dict[tuple[int, ...], np.ndarray]:
    """The losses of each document's labelled tokens, by the document's ids."""
    segments = batch.get("segment_ids", batch["attention_mask"])

    @jax.jit
    def forward(params, input_ids, masks):
        return jax.nn.log_softmax(model.apply(params, input_ids, **masks)[0])

    masks = {name: batch[name] for name in ("attention_mask", "segment_ids") if name in batch}
    log_probs = np.asarray(forward(params, batch["input_ids"], masks))
    found = {}
    for row, ids in enumerate(batch["input_ids"]):
        for number in range(1, segments[row].max() + 1):
            places = np.flatnonzero(segments[row] == number)
            labelled = [p for p in places if batch["labels"][row, p] != IGNORE]
            values = [-log_probs[row, p - 1, ids[p]] for p in labelled]
            found[tuple(ids[places].tolist())] = np.asarray(values)
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
def test_some_rows_are_those_of_the_whole_batch(accumulate):
    """As several processes make them: as long as the longest row of all."""
    settings = TrainSettings(
        steps=6, batch_size=4, accumulate=accumulate, group_by_length=True, buckets=3
    )
    examples = [TokenizedExample(np.full(9 * n, n), np.full(9 * n, n)) for n in range(1, 21)]
    data = TokenizedDataset(tuple(examples), 0)
    whole, part = StepBatches(data, settings), StepBatches(data, settings, rows=[1, 2])
    for step in range(6):
        for name, array in whole[step].items():
            expected = np.asarray(array)[..., 1:3, :]
            np.testing.assert_array_equal(part[step][name], expected)
        assert part.tokens_of(step) == np.sum(whole[step]["attention_mask"])
    if accumulate == 1:
        assert len({whole[step]["input_ids"].shape for step in range(6)}) > 1


@pytest.mark.standard_promotion
def test_packing_changes_neither_losses_nor_gradients():
    model, data = models.model(), models.dataset(8)
    data = type(data)(data.examples[:7], data.pad_id)
    apart = StepBatches(data, TrainSettings(steps=1, batch_size=7))[0]
    together = StepBatches(
        data, TrainSettings(steps=1, batch_size=3, sequence_length=40, packing=True)
    )[0]
    assert together["segment_ids"].max() >= 2
    config = qj.LoraConfig(rank=4, alpha=8, targets=("k_proj", "down_proj"))
    adapters = qj.lora.init(jax.random.key(1), model.params, config)
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)

    def loss(adapters, batch):
        return model.loss(qj.lora.attach(model.params, adapters), batch)

    params = qj.lora.attach(model.params, adapters)
    one, other = token_losses(model, params, apart), token_losses(model, params, together)
    assert one.keys() == other.keys() and len(one) == 7
    for ids, values in one.items():
        np.testing.assert_allclose(other[ids], values, rtol=0, atol=1e-5)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (sums, grads) = zip(*(run(adapters, batch) for batch in (apart, together)), strict=True)
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5)
    assert sums[0][0] == pytest.approx(sum(map(np.sum, one.values())), rel=1e-5)
    assert sums[0][1] == sum(map(len, one.values()))
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        assert jnp.abs(a).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(a).max()))


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("packing", [False, True])
def test_the_stream_goes_on_anywhere(packing):
    settings = TrainSettings(
        epochs=2.0, batch_size=2, accumulate=2, packing=packing, sequence_length=40
    )
    batches = StepBatches(models.dataset(30), settings)
    whole = list(batches.start())
    assert len(whole) == batches.steps == len(batches)
    assert {batch["input_ids"].shape for batch in whole} == {(2, 2, 40)}
    again = StepBatches(models.dataset(30), settings)
    rest = list(again.start(3))
    assert len(rest) == len(whole) - 3 and all(map(equal, rest, whole[3:]))
    assert list(again.start(batches.steps)) == []


def test_at_most_three_shapes():
    settings = TrainSettings(epochs=2.0, batch_size=1, group_by_length=True)
    data = models.dataset(40)
    examples = tuple(
        type(e)(np.tile(e.input_ids, n % 9 + 1), np.tile(e.labels, n % 9 + 1))
        for n, e in enumerate(data)
    )
    batches = StepBatches(type(data)(examples, 0), settings)
    shapes = {batch["input_ids"].shape for batch in batches.start()}
    assert shapes == {(1, bucket) for bucket in batches.buckets} and len(shapes) == 3
    assert batches.largest()["input_ids"].shape[-1] == batches.buckets[-1]


def test_batches_are_made_ahead(monkeypatch):
    """By another thread, while a step is under way; what is waited for is measured."""
    made = []
    real = StepBatches.__getitem__

    def slow(self, step):
        time.sleep(0.1)
        made.append(threading.current_thread())
        return real(self, step)

    monkeypatch.setattr(StepBatches, "__getitem__", slow)
    batches = StepBatches(models.dataset(), TrainSettings(steps=4))
    stream = batches.start()
    next(stream)
    assert batches.waited >= 0.1
    stop = time.monotonic() + 20
    while len(made) < 4 and time.monotonic() < stop:
        time.sleep(0.01)
    next(stream)
    assert batches.waited < 0.1 and threading.main_thread() not in made
    assert len(list(stream)) == 2
