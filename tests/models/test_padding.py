"""Padding on either side of a row, and what the loss makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.models import read_config
from qlora_jax.models.padding import to_the_right
from tests.models import decoders

LENGTHS = (12, 5, 1)
T = 12


@pytest.fixture(scope="module")
def model():
    about = {"model_type": "llama", "vocab_size": 40, "num_attention_heads": 4}
    about |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = read_config(about)
    return qj.Model(config, decoders.random_params(config), None, "", jnp.float32)


def rows(model, side: str, fill: int):
    """[3, T] of ids, labels and mask; padding has the id `fill`."""
    ids = np.full((len(LENGTHS), T), fill, np.int32)
    real = np.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(T - length, T)
        key = jax.random.key(row)
        ids[row, place] = jax.random.randint(key, (length,), 0, model.config.vocab_size)
        real[row, place] = 1
    return {"input_ids": ids, "labels": np.where(real, ids, -100), "attention_mask": real}


def test_padding_goes_behind_the_tokens():
    mask = jnp.array([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    x = jnp.broadcast_to(jnp.arange(4), (4, 4))
    moved, nothing, after = to_the_right(mask, (x, None, mask))
    assert moved.tolist() == [[2, 3, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert nothing is None
    assert after.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_padded_rows_is_that_of_each_by_itself(model, side):
    gradient = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    (total, count), slopes = gradient(model.params, rows(model, side, fill=3))
    (other, _), other_slopes = gradient(model.params, rows(model, side, fill=7))
    assert total == other
    jax.tree.map(np.testing.assert_array_equal, slopes, other_slopes)

    batch = rows(model, "right", fill=3)
    alone = 0.0
    for row, length in enumerate(LENGTHS[:2]):  # one token alone has nothing to predict
        one = {name: x[row : row + 1, :length] for name, x in batch.items()}
        del one["attention_mask"]
        alone += float(model.loss(model.params, one)[0])
    assert count == sum(LENGTHS) - len(LENGTHS)
    np.testing.assert_allclose(total, alone, rtol=1e-6)


def test_padding_is_no_part_of_attention_in_training(model, monkeypatch):
    """cuDNN would be given a mask of T x T numbers, splash attention segments."""
    seen = []
    monkeypatch.setattr(
        "qlora_jax.models.attention_xla.attend",
        lambda q, k, v, mask, **_: seen.append(mask) or q,
    )
    jax.eval_shape(model.loss, model.params, rows(model, "left", fill=0))
    assert seen and not any(mask.grouped for mask in seen)
