"""BERT and RoBERTa beside transformers': logits, gradients, heads, adapters, checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import qlora_jax as qj
from qlora_jax.checkpoints.export import save_pretrained
from tests.parity import encoders

pytestmark = pytest.mark.standard_promotion

BERT, ROBERTA = transformers.BertConfig, transformers.RobertaConfig
# Model, what is changed of the configuration, which labels it has.
VARIANTS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "bert, words": (transformers.BertForMaskedLM, BERT, {}, ""),
    "bert, classes": (
        transformers.BertForSequenceClassification,
        BERT,
        {"num_labels": 3, "hidden_act": "gelu_new", "type_vocab_size": 3},
        "classes",
    ),
    "bert, true or false": (
        transformers.BertForSequenceClassification,
        BERT,
        {"num_labels": 4, "hidden_act": "relu", "layer_norm_eps": 1e-5},
        "true or false",
    ),
    "roberta, words": (
        transformers.RobertaForMaskedLM,
        ROBERTA,
        {"type_vocab_size": 1, "hidden_act": "relu"},
        "",
    ),
    "roberta, a number": (
        transformers.RobertaForSequenceClassification,
        ROBERTA,
        {"num_labels": 1, "pad_token_id": 2},
        "numbers",
    ),
}


def peer_of(variant: str) -> Any:
    make, config, changes, _ = VARIANTS[variant]
    return encoders.random_model(make, config(**(encoders.SMALL | changes)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant, tmp_path):
    peer = peer_of(variant)
    peer.save_pretrained(tmp_path)
    model = qj.load(tmp_path)
    make, _, _, kind = VARIANTS[variant]
    encoders.compare(model, peer, make.__name__, kind)


@pytest.mark.parametrize("variant", ["bert, words", "roberta, words"])
def test_packed(variant, tmp_path):
    peer = peer_of(variant)
    peer.save_pretrained(tmp_path)
    model = qj.load(tmp_path)
    ours, theirs = encoders.packed(peer.config)
    first = model.config.first_position
    with torch.no_grad():
        expected = peer(
            torch.from_numpy(ours["input_ids"]).long(),
            attention_mask=torch.where(torch.from_numpy(theirs["mask"]), 0.0, -1e30),
            position_ids=torch.from_numpy(theirs["positions"] + first),
        ).logits.numpy()
    found = encoders.logits(model, model.params, ours)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    whole = encoders.logits(model, model.params, {"input_ids": ours["input_ids"]})
    assert np.abs(whole - expected).max() > 0.1


def test_a_bare_encoder_in_a_pickle(tmp_path):
    """As old checkpoints are: BertModel's own names, LayerNorm.gamma, a buffer of positions."""
    peer = encoders.random_model(transformers.BertModel, BERT(**encoders.SMALL))
    peer.config.save_pretrained(tmp_path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): x
        for name, x in peer.state_dict().items()
    }
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in old.items()}
    old["embeddings.position_ids"] = torch.arange(48)[None]
    torch.save(old, tmp_path / "pytorch_model.bin")
    model = qj.load(tmp_path, head="classification", num_labels=3)
    inputs = encoders.batch(peer.config, "right")
    with torch.no_grad():
        expected = peer(**encoders.to_torch(inputs)).last_hidden_state.numpy()
    found = np.asarray(jax.jit(model.hidden)(model.params, **inputs))
    where = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(found[where], expected[where], rtol=0, atol=1e-4)


def test_adapters_and_export(tmp_path):
    make, config = transformers.RobertaForSequenceClassification, ROBERTA
    peer = encoders.random_model(make, config(**encoders.SMALL, num_labels=3))
    encoders.check_adapter_and_export(make, peer, tmp_path)


def test_masked_words_exported(tmp_path):
    peer = peer_of("bert, words")
    peer.save_pretrained(tmp_path / "base")
    model = qj.load(tmp_path / "base")
    save_pretrained(tmp_path / "again", model, dtype=jnp.float32)
    again = encoders.load_peer(transformers.BertForMaskedLM, tmp_path / "again")
    inputs = encoders.batch(peer.config, "right")
    np.testing.assert_array_equal(
        encoders.peer_logits(again, inputs), encoders.peer_logits(peer, inputs)
    )
