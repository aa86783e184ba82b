"""DeBERTa-v2 and v3 beside transformers': logits, gradients, heads, adapters, checkpoints."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.models.deberta_v2 import modeling_deberta_v2

import qlora_jax as qj
from qlora_jax.models import deberta
from tests.parity import encoders

pytestmark = pytest.mark.standard_promotion

MASKED_LM = transformers.DebertaV2ForMaskedLM
CLASSIFICATION = transformers.DebertaV2ForSequenceClassification
V3 = {
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
# Model, what is changed of V3, which labels it has.
VARIANTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "v3, words": (MASKED_LM, {"legacy": False}, ""),
    "v2, classes": (
        CLASSIFICATION,
        {"conv_kernel_size": 3, "conv_act": "gelu", "num_labels": 3, "pooler_hidden_act": "relu"},
        "classes",
    ),
    "own projections": (
        CLASSIFICATION,
        {
            "share_att_key": False,
            "norm_rel_ebd": "none",
            "position_biased_input": True,
            "type_vocab_size": 2,
            "conv_kernel_size": 5,
            "conv_groups": 2,
            "num_labels": 2,
        },
        "numbers",
    ),
    "no buckets, c2p": (
        MASKED_LM,
        {
            "pos_att_type": ["c2p"],
            "position_buckets": -1,
            "max_relative_positions": 6,
            "embedding_size": 32,
            "hidden_act": "gelu_new",
        },
        "",
    ),
    "p2c, own projection": (
        CLASSIFICATION,
        {
            "pos_att_type": ["p2c"],
            "share_att_key": False,
            "max_relative_positions": 16,
            "num_labels": 2,
            "problem_type": "regression",
        },
        "numbers",
    ),
    "absolute": (
        CLASSIFICATION,
        {
            "relative_attention": False,
            "position_biased_input": True,
            "num_labels": 3,
            "problem_type": "multi_label_classification",
            "norm_rel_ebd": "none",
        },
        "true or false",
    ),
}


def peer_of(variant: str) -> Any:
    make, changes, _ = VARIANTS[variant]
    config = transformers.DebertaV2Config(**(encoders.SMALL | V3 | changes))
    return encoders.random_model(make, config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant, tmp_path):
    peer = peer_of(variant)
    peer.save_pretrained(tmp_path)
    model = qj.load(tmp_path)
    make, _, kind = VARIANTS[variant]
    encoders.compare(model, peer, make.__name__, kind)


def test_packed(tmp_path):
    """The encoder of transformers takes a mask [B, T, T]; the model around it does not."""
    peer = peer_of("p2c, own projection")
    peer.save_pretrained(tmp_path)
    model = qj.load(tmp_path)
    ours, theirs = encoders.packed(peer.config)
    body = peer.deberta
    with torch.no_grad():
        embedded = body.embeddings(torch.from_numpy(ours["input_ids"]).long())
        expected = body.encoder(embedded, torch.from_numpy(theirs["mask"][:, 0]).long())
    found = np.asarray(jax.jit(model.hidden)(model.params, **ours))
    np.testing.assert_allclose(found, expected.last_hidden_state.numpy(), rtol=0, atol=1e-4)


def test_adapters_and_export(tmp_path):
    encoders.check_adapter_and_export(CLASSIFICATION, peer_of("v2, classes"), tmp_path)


@pytest.mark.parametrize(
    ("buckets", "longest"), [(256, 512), (8, 64), (32, 512), (16, 24), (64, 4096), (512, 2048)]
)
def test_buckets_of_distances(buckets, longest):
    """Where fp32 rounding decides, at powers of two, too."""
    distance = np.arange(-longest - 9, longest + 10)
    expected = modeling_deberta_v2.make_log_bucket_position(
        torch.from_numpy(distance), buckets, longest
    )
    np.testing.assert_array_equal(
        deberta.log_buckets(distance, buckets, longest), expected.long().numpy()
    )
