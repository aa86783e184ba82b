"""T5 by itself; that its logits are transformers' is shown in tests/parity."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import NF4, LoraConfig, QloraError, lora, peft, quantize_tree
from qlora_jax.checkpoints.seq2seq import Seq2SeqModel
from qlora_jax.models import abstract_params, bind, init_params, read_config
from qlora_jax.models.t5 import relative_buckets
from qlora_jax.models.t5_config import T5Config
from tests.lift.oracle import check

BASE = {
    "model_type": "t5",
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "v1.0": {},
    "v1.1": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "num_decoder_layers": 3,
        "d_kv": 10,
    },
}
SOURCE = jax.random.randint(jax.random.key(1), (2, 9), 2, 50)
TARGET = jax.random.randint(jax.random.key(2), (2, 7), 2, 50)


def config(variant: str, **changes: Any) -> T5Config:
    return read_config(BASE | VARIANTS[variant] | changes)


@functools.cache
def problem(variant: str) -> tuple[T5Config, Any]:
    return config(variant), init_params(config(variant), jax.random.key(0))


def logits(t5: Any, source: jax.Array, target: jax.Array, **masks: jax.Array) -> jax.Array:
    encoder = {name: x for name, x in masks.items() if not name.startswith("decoder")}
    return t5.head(t5.decode(target, t5.encode(source, **encoder), **masks))


def segments(rows: jax.Array) -> jax.Array:
    """For rows [B, T] packed into one: which of them each token is of, [1, B T]."""
    return jnp.repeat(jnp.arange(rows.shape[0]), rows.shape[1])[None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_survives_its_file(variant):
    assert read_config(config(variant).to_hf()) == config(variant)


def test_what_the_files_of_each_version_mean():
    old, new = config("v1.0"), config("v1.1")
    assert (old.dense_act_fn, old.is_gated_act, old.num_decoder_layers) == ("relu", False, 2)
    assert (new.dense_act_fn, new.is_gated_act, new.num_decoder_layers) == ("gelu_new", True, 3)
    assert old.tie_word_embeddings and old.scale_decoder_outputs
    assert not new.tie_word_embeddings and not new.scale_decoder_outputs
    assert (old.decoder_start_token_id, old.pad_token_id, old.eos_token_id) == (0, 0, (1,))
    # transformers 5 writes both switches, and always ties.
    fifth = config("v1.1", tie_word_embeddings=True, scale_decoder_outputs=False)
    assert fifth.tie_word_embeddings and not fifth.scale_decoder_outputs
    assert config("v1.0", pad_token_id=3).decoder_start_token_id == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_kv": None}, r"lacks \['d_kv'\]"),
        ({"d_ff": "48"}, "d_ff is '48', expected a whole number"),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0, expected at least 1"),
        ({"feed_forward_proj": "gated-tanh"}, "dense_act_fn 'tanh' is not supported"),
        ({"feed_forward_proj": "double-relu"}, "feed_forward_proj 'double-relu'"),
        ({"relative_attention_num_buckets": 3}, "num_buckets is 3, expected at least 4"),
        ({"relative_attention_max_distance": 4}, "max_distance is 4, expected more than 4"),
        ({"decoder_start_token_id": 50}, "decoder_start_token_id is 50, outside the vocabulary"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(QloraError, match=message):
        config("v1.0", **changes)


def test_buckets_by_the_rule():
    """T5's own sizes: 8 exact distances each way, 8 logarithmic steps up to 128, then the last."""
    distances = np.arange(-200, 201)
    both, back = (
        np.asarray(relative_buckets(distances, buckets=n, max_distance=128, bidirectional=n == 32))
        for n in (32, 16)
    )
    assert dict(zip(distances.tolist(), back.tolist(), strict=True)) == {
        d: 0 if d > 0 else -d if d > -8 else min(15, 8 + math.floor(2 * math.log2(-d / 8) + 1e-9))
        for d in distances.tolist()
    }
    np.testing.assert_array_equal(both[:201], back[:201])
    np.testing.assert_array_equal(both[201:], 16 + back[:200][::-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_packing_and_the_cache_change_nothing(variant):
    full, params = problem(variant)
    pads = [(0, 0), (2, 3)]
    source, target = jnp.pad(SOURCE, pads), jnp.pad(TARGET, pads)
    mask, own_mask = (jnp.pad(jnp.ones_like(x), pads) for x in (SOURCE, TARGET))

    @jax.jit
    def run(params: Any) -> Any:
        t5 = bind(full, params, jnp.float32)
        plain = logits(t5, SOURCE, TARGET)
        padded = logits(t5, source, target, attention_mask=mask, decoder_attention_mask=own_mask)
        packed = logits(
            t5,
            SOURCE.reshape(1, -1),
            TARGET.reshape(1, -1),
            segment_ids=segments(SOURCE),
            decoder_segment_ids=segments(TARGET),
        )
        cache = t5.new_cache(t5.encode(source, attention_mask=mask), 10, attention_mask=mask)
        first, cache = t5.extend(TARGET[:, :6], cache)
        last, cache = t5.extend(TARGET[:, 6:], cache)
        decoded = t5.head(jnp.concatenate([first, last], axis=1))
        return plain, padded[:, 2:-3], packed.reshape(plain.shape), decoded

    plain, *others = run(params)
    for other in others:
        np.testing.assert_allclose(other, plain, rtol=0, atol=5e-5)


def test_what_is_refused():
    full, params = problem("v1.0")
    t5 = bind(full, params, jnp.float32)
    encoded = jnp.zeros((2, 9, 32))
    with pytest.raises(QloraError, match="segment_ids and decoder_segment_ids: give both"):
        t5.decode(TARGET, encoded, segment_ids=segments(SOURCE))
    cache = jax.eval_shape(lambda: t5.new_cache(encoded, 6))
    with pytest.raises(ValueError, match="6 slots, 0 in use: no room for 7 tokens more"):
        t5.extend(TARGET, dataclasses.replace(cache, index=0))


def test_an_adapter_of_the_shared_table_is_not_for_peft(tmp_path):
    full, params = problem("v1.0")
    model = Seq2SeqModel(full, params, None, "here", jnp.float32)
    adapters = lora.init(jax.random.key(0), params, LoraConfig(rank=2, targets=("shared",)))
    with pytest.raises(QloraError, match="shared/embedding: .* would do nothing"):
        peft.save(tmp_path / "out", adapters, model)
    assert not (tmp_path / "out").exists()


def test_loss_is_that_of_the_shifted_labels():
    full, params = problem("v1.0")
    model = Seq2SeqModel(full, params, None, "here", jnp.float32)
    labels = TARGET.at[0, 4:].set(-100)
    shifted = jnp.where(labels == -100, 0, jnp.pad(labels, ((0, 0), (1, 0)))[:, :-1])

    @jax.jit
    def run(params: Any) -> Any:
        batch = {"input_ids": SOURCE, "labels": labels}
        packed = {name: x.reshape(1, -1) for name, x in batch.items()} | {
            "segment_ids": segments(SOURCE),
            "decoder_segment_ids": segments(TARGET),
        }
        log_p = jax.nn.log_softmax(logits(bind(full, params, jnp.float32), SOURCE, shifted))
        at_labels = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        expected = -jnp.sum(at_labels, where=labels != -100)
        return expected, model.loss(params, batch), model.loss(params, packed)

    expected, *found = run(params)
    for total, tokens in found:
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert float(tokens) == 11


def test_4_bits_and_adapters_under_strict_lift():
    full, params = problem("v1.1")
    modules = (
        "encoder/block/self_attention/q",
        "encoder/block/feed_forward/wo",
        "decoder/block/self_attention/v",
        "decoder/block/cross_attention/k",
        "decoder/block/feed_forward/wi_1",
    )
    axes = {f"{module}/kernel": (1, 1) for module in modules}
    apply = Seq2SeqModel(full, params, None, "here", jnp.float32).apply
    remat = functools.partial(apply, remat=True)
    check(remat, params, axes, SOURCE, TARGET, bases=("nf4",), rtol=1e-4)


def test_bytes_of_flan_t5_xxl_by_hand():
    xxl = {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "num_decoder_layers": None,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    }
    dense = abstract_params(config("v1.1", **xxl), jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(dense)) == 11_135_332_352
    attention, feed_forward = 24 * (4 + 8), 24 * (3 + 3)

    def stored(weights: int) -> int:
        """Codes, 8-bit scales, an fp32 scale for each 256 of these, and one offset."""
        return weights // 2 + weights // 64 + 4 * (weights // 64 // 256) + 4

    expected = attention * stored(4096 * 4096) + feed_forward * stored(4096 * 10240)
    expected += 2 * (2 * 32128 * 4096)  # table and head, in bf16
    expected += 2 * (2 * 32 * 64)  # position biases
    expected += 4 * 4096 * (24 * (2 + 3) + 2)  # norms, in fp32
    assert expected == 6_136_735_424
    leaves = jax.tree.leaves(quantize_tree(dense, NF4()))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == expected
