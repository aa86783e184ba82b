"""Adapters exchanged with PEFT over the same base: the dequantized 4-bit weights."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import peft
import pytest
import torch

import qlora_jax as qj
from tests.parity.decoders import batch, four_bit, load_peer, logits, pair, peer_logits
from tests.parity.test_transformers import peer_config

pytestmark = pytest.mark.standard_promotion

CONFIGS = {
    "all linear": qj.LoraConfig(rank=4, alpha=8),
    "rslora": qj.LoraConfig(rank=4, alpha=8, rslora=True, targets=("q_proj", "v_proj")),
    "patterns": qj.LoraConfig(
        rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"mlp.*": 3}
    ),
    "in full": qj.LoraConfig(rank=4, alpha=8, modules_to_save=("norm", "lm_head")),
    "embedding": qj.LoraConfig(rank=4, alpha=8, targets=("q_proj", "embed_tokens")),
}


def base(variant: str, tmp_path: Path) -> tuple[qj.Model, Path]:
    return four_bit(pair(peer_config(variant), tmp_path / "base").folder, tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("variant", ["llama 3", "smollm2"])
def test_ours_loaded_by_peft(variant, name, tmp_path):
    """Trained here for a few steps, so that B is not zero."""
    config = CONFIGS[name]
    if variant == "smollm2" and name == "in full":
        config = qj.LoraConfig(rank=4, alpha=8, modules_to_save=("norm", "embed_tokens"))
    model, dense = base(variant, tmp_path)
    adapters = qj.lora.init(jax.random.key(0), model.params, config)
    optimizer = optax.adamw(3e-2)
    state = qj.TrainState.create(adapters, optimizer)
    step = qj.make_train_step(model.loss, optimizer)
    given = batch("whole")
    for _ in range(4):
        state, _ = step(state, model.params, {"input_ids": given.ids, "labels": given.ids})
    qj.peft.save(tmp_path / "adapter", state.adapters, model, config)
    loaded = peft.PeftModel.from_pretrained(load_peer(dense), tmp_path / "adapter").eval()
    ours = logits(model, qj.lora.attach(model.params, state.adapters), given)
    assert np.abs(ours - logits(model, model.params, given)).max() > 0.1
    np.testing.assert_allclose(ours, peer_logits(loaded, given), rtol=0, atol=1e-4)


def peft_config(name: str) -> peft.LoraConfig:
    common: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    return {
        "all linear": peft.LoraConfig(**common, target_modules="all-linear"),
        "rslora": peft.LoraConfig(
            **common, use_rslora=True, target_modules=["q_proj", "down_proj"]
        ),
        "some layers": peft.LoraConfig(
            **common,
            target_modules=["q_proj", "up_proj"],
            layers_to_transform=[0, 2],
            rank_pattern={"layers.2.mlp.up_proj": 6},
            alpha_pattern={r"layers\.0\..*": 5},
        ),
        "in full": peft.LoraConfig(
            **common, target_modules=["o_proj"], modules_to_save=["lm_head", "input_layernorm"]
        ),
        "embedding": peft.LoraConfig(**common, target_modules=["embed_tokens", "k_proj"]),
    }[name]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("name", ["all linear", "rslora", "some layers", "in full", "embedding"])
def test_pefts_loaded_here(name, tmp_path):
    model, dense = base("llama 3", tmp_path)
    torch.manual_seed(1)
    trained = peft.get_peft_model(load_peer(dense), peft_config(name)).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "adapter")
    adapters, _ = qj.peft.load(tmp_path / "adapter", model)
    given = batch("left")
    ours = logits(model, qj.lora.attach(model.params, adapters), given)
    real = given.real
    assert np.abs(ours - logits(model, model.params, given)).max() > 0.1
    np.testing.assert_allclose(ours[real], peer_logits(trained, given)[real], rtol=0, atol=1e-4)
    # And back: what we write of it, PEFT reads.
    qj.peft.save(tmp_path / "again", adapters, model)
    again = peft.PeftModel.from_pretrained(load_peer(dense), tmp_path / "again").eval()
    np.testing.assert_allclose(ours[real], peer_logits(again, given)[real], rtol=0, atol=1e-4)
