"""Encoders without transformers: sizes, depth, packed documents, losses, what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as qj
from qlora_jax.checkpoints.encoder import EncoderModel
from qlora_jax.errors import QloraError
from qlora_jax.generation import generate
from qlora_jax.models import abstract_params, read_config
from qlora_jax.models.classification import classification_loss
from qlora_jax.quant import NF4, dequantize_tree, path_str, quantize_tree

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
DEBERTA = TINY | {
    "model_type": "deberta-v2",
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
}
ROBERTA = TINY | {"model_type": "roberta", "type_vocab_size": 1}
BERT = TINY | {"model_type": "bert"}


def make_model(hf: dict[str, Any], architecture: str, **settings: Any) -> Any:
    config = read_config(hf | {"architectures": [architecture]} | settings)
    rng = np.random.default_rng(0)

    def random(path: Any, x: Any) -> jax.Array:
        drawn = 0.2 * rng.normal(size=x.shape).astype(np.float32)
        return jnp.asarray(drawn + 1 if path_str(path).endswith("scale") else drawn)

    params = jax.tree_util.tree_map_with_path(random, abstract_params(config))
    return EncoderModel(config, params, None, "tiny", jnp.float32)


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def matrix(k: int, n: int) -> int:
    """Bytes of one double-quantized NF4 matrix: codes, scales, scales of scales, their offset."""
    return k * n // 2 + k * n // 64 + 4 * -(-k * n // (64 * 256)) + 4


def norm(d: int) -> int:
    return 2 * 4 * d


def test_bytes_of_roberta_large():
    hf = {
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        "vocab_size": 50265,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }
    tree = quantize_tree(abstract_params(read_config(hf), jnp.bfloat16), NF4())
    d, f, v = 1024, 4096, 50265
    biases = 2 * (4 * d + f + d)
    layer = 4 * matrix(d, d) + matrix(d, f) + matrix(f, d) + biases + 2 * norm(d)
    embeddings = 2 * d * (v + 514 + 1) + norm(d)
    head = 2 * (d * d + d) + norm(d) + 2 * v
    assert size(tree) == 24 * layer + embeddings + head == 262_836_978


def test_bytes_of_deberta_v2_xxlarge():
    hf = {
        "model_type": "deberta-v2",
        "architectures": ["DebertaV2ForSequenceClassification"],
        "vocab_size": 128100,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 24,
        "attention_head_size": 64,
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    }
    abstract = abstract_params(read_config(hf), jnp.bfloat16)
    d, f, v = 1536, 6144, 128100
    weights = 48 * (4 * d * d + 2 * d * f + 9 * d + f) + v * d + 512 * d + 3 * d * d
    assert sum(x.size for x in jax.tree.leaves(abstract)) == pytest.approx(weights, rel=0.002)
    tree = quantize_tree(abstract, NF4())
    biases = 2 * (4 * d + f + d)
    layer = 4 * matrix(d, d) + matrix(d, f) + matrix(f, d) + biases + 2 * norm(d)
    shared = 2 * 512 * d + norm(d)  # relative embeddings
    shared += 2 * (3 * d * d + d) + norm(d)  # convolution
    embeddings = 2 * v * d + norm(d)
    head = 2 * (d * d + d) + 2 * (2 * d + 2)
    assert size(tree) == 48 * layer + shared + embeddings + head


@pytest.mark.parametrize("hf", [BERT, DEBERTA], ids=["bert", "deberta"])
def test_programs_do_not_grow_with_depth(hf):
    def program(layers: int) -> str:
        config = read_config(
            hf | {"num_hidden_layers": layers, "architectures": ["DebertaV2ForMaskedLM"]}
        )
        params = abstract_params(config)
        model = EncoderModel(config, params, None, "abstract", jnp.float32)
        ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        batch = {"input_ids": ids, "labels": ids}
        return jax.jit(jax.grad(lambda p, b: model.loss(p, b)[0])).lower(params, batch).as_text()

    assert abs(len(program(2)) - len(program(6))) < 500


def test_packed_documents_do_not_see_each_other():
    """Not through the convolution either, which looks at neighbours."""
    settings = {"position_biased_input": True, "conv_groups": 2, "conv_kernel_size": 5}
    model = make_model(DEBERTA, "DebertaV2Model", **settings)
    ids = jax.random.randint(jax.random.key(1), (1, 12), 1, 40)
    segments = jnp.asarray([[3] * 6 + [1] * 6], jnp.int32)
    run = jax.jit(model.hidden)
    packed = run(model.params, ids, segment_ids=segments)
    apart = run(model.params, ids.reshape(2, 6)).reshape(packed.shape)
    np.testing.assert_allclose(packed, apart, atol=1e-5)
    together = run(model.params, ids, segment_ids=jnp.zeros_like(segments))
    assert np.abs(packed - together).max() > 0.01


CASES = {
    "roberta": (ROBERTA, "RobertaForSequenceClassification"),
    "deberta": (DEBERTA, "DebertaV2ForSequenceClassification"),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", CASES)
def test_a_step_with_the_head_trained_in_full(name):
    """4-bit weights, adapters and the head: the loss is that of dense weights; all of it learns."""
    dense = make_model(*CASES[name], num_labels=3)
    quantized = quantize_tree(dense.params, NF4())
    config = qj.LoraConfig(rank=2, alpha=4, modules_to_save=("classifier",))
    adapters = qj.lora.init(jax.random.key(1), quantized, config)
    head = [path for path in adapters if path.startswith("classifier/")]
    assert len(head) == (4 if name == "roberta" else 2)
    assert not any(path.startswith("pooler") for path in adapters)
    ids = jax.random.randint(jax.random.key(2), (4, 10), 3, 40)
    batch = {"input_ids": ids, "labels": jnp.asarray([0, 1, 2, -100])}
    optimizer = optax.adam(1e-2)
    step = qj.make_train_step(dense.loss, optimizer)
    state = qj.TrainState.create(adapters, optimizer)
    state, first = step(state, quantized, batch)
    total, count = jax.jit(dense.loss)(dequantize_tree(quantized), batch)
    assert first["tokens"] == count == 3
    np.testing.assert_allclose(first["loss"], total / count, rtol=1e-5)
    for _ in range(4):
        state, last = step(state, quantized, batch)
    assert last["loss"] < 0.7 * first["loss"]
    for path in head:
        assert np.abs(state.adapters[path] - adapters[path]).max() > 1e-3, path


def test_losses_of_rows():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 3)).astype(np.float32)
    truth = rng.integers(0, 2, (4, 3)).astype(np.float32)
    p = 1 / (1 + np.exp(-logits))
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    classes = np.asarray([2, 0, -100, 1])
    cases = {
        "single_label_classification": (classes, -logs[[0, 1, 3], [2, 0, 1]].sum(), 3),
        "multi_label_classification": (
            truth,
            -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).sum(),
            12,
        ),
        "regression": (truth, ((logits - truth) ** 2).sum(), 12),
        "soft_labels": (truth, -(logs * truth).sum(), 4),
    }
    for problem, (labels, expected, count) in cases.items():
        total, counted = classification_loss(jnp.asarray(logits), jnp.asarray(labels), problem)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert counted == count
    with pytest.raises(QloraError, match=r"must be \(4, 1\), not \(4, 3\)"):
        classification_loss(jnp.asarray(logits), jnp.asarray(truth), "single_label_classification")


def test_the_loss_that_labels_ask_for():
    config = read_config(BERT | {"id2label": {"0": "a", "1": "b"}})
    numbers, classes = jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32)
    assert config.loss_of(classes) == "single_label_classification"
    assert config.loss_of(numbers) == "multi_label_classification"
    assert read_config(DEBERTA).loss_of(numbers) == "soft_labels"
    assert config.with_head("classification", 1).loss_of(numbers[:, :1]) == "regression"
    named = config.with_head("classification", 2, "regression")
    assert named.labels == ("a", "b")
    assert named.loss_of(classes) == "regression"


@pytest.mark.parametrize("hf", [BERT, ROBERTA, DEBERTA], ids=["bert", "roberta", "deberta"])
def test_a_configuration_is_written_as_it_was_read(hf):
    config = read_config(hf | {"id2label": {"0": "no", "1": "yes"}}).with_head("classification")
    assert read_config(config.to_hf()) == config


REFUSED = {
    "hidden_act 'swiglu'": BERT | {"hidden_act": "swiglu"},
    "is_decoder True": BERT | {"is_decoder": True},
    "not a multiple of num_attention_heads": BERT | {"num_attention_heads": 5},
    "type_vocab_size is 0": BERT | {"type_vocab_size": 0},
    "apart from the embedding": BERT
    | {"tie_word_embeddings": False, "architectures": ["BertForMaskedLM"]},
    "problem_type 'ranking'": BERT | {"problem_type": "ranking"},
    "id2label numbers its labels": BERT | {"id2label": {"1": "a", "2": "b"}},
    "conv_kernel_size is 4": DEBERTA | {"conv_kernel_size": 4},
    "pos_att_type": DEBERTA | {"pos_att_type": "p2p"},
    "attention_head_size 16": DEBERTA | {"attention_head_size": 16},
    "embedding_size 16 is not hidden_size 32": DEBERTA
    | {"embedding_size": 16, "legacy": False, "architectures": ["DebertaV2ForMaskedLM"]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_configurations(message):
    with pytest.raises(QloraError, match=message):
        read_config(REFUSED[message])


def test_what_a_model_cannot_do():
    bare = make_model(ROBERTA, "RobertaModel")
    ids = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(QloraError, match="load it with head="):
        bare.apply(bare.params, ids)
    with pytest.raises(QloraError, match="a row has 31 tokens, the model has positions for 30"):
        bare.hidden(bare.params, jnp.ones((1, 31), jnp.int32))
    config = dataclasses.replace(bare.config, head="classification")
    classifier = dataclasses.replace(bare, config=config)
    with pytest.raises(QloraError, match="give every document its own row"):
        classifier.apply(bare.params, ids, segment_ids=ids)


def test_an_encoder_does_not_generate():
    model = make_model(BERT, "BertForMaskedLM")
    with pytest.raises(QloraError, match="EncoderModel.*: only decoders and encoder-decoders gen"):
        generate(model, [[1, 2]])
