"""T5 beside transformers and PEFT: logits, gradients, generation, adapters, merged weights."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers

import qlora_jax as qj
from qlora_jax.checkpoints.export import save_pretrained
from qlora_jax.checkpoints.names import parameters
from qlora_jax.checkpoints.seq2seq import Seq2SeqModel
from qlora_jax.generation import Sampling, generate
from qlora_jax.lora.adapters import named_leaves
from qlora_jax.models.t5 import relative_buckets

pytestmark = pytest.mark.standard_promotion

SMALL = {
    "vocab_size": 96,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "v1.0": {},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "uneven": {
        "feed_forward_proj": "gated-silu",
        "tie_word_embeddings": False,
        "num_layers": 3,
        "num_decoder_layers": 1,
        "d_kv": 24,
        "num_heads": 3,
    },
    "tied, not scaled": {
        "feed_forward_proj": "gelu",
        "scale_decoder_outputs": False,
        "num_decoder_layers": 3,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-3,
        "decoder_start_token_id": 5,
        "pad_token_id": 4,
    },
}


def random_model(variant: str) -> Any:
    """A model with nothing at zero or one, and with sharp attention."""
    torch.manual_seed(0)
    changes = VARIANTS[variant]
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**(SMALL | changes)))
    if not changes.get("tie_word_embeddings", True):
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "relative_attention_bias" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif name.endswith((".q.weight", ".k.weight")):
                parameter.mul_(2.0)
            elif name == "shared.weight":
                parameter.mul_(0.3)
    return model.eval()


def padding(rows: np.ndarray, side: str) -> np.ndarray:
    """A mask of them [B, T], the last row being shorter."""
    mask = np.ones_like(rows)
    cut = rows.shape[1] // 4
    if side != "none":
        mask[-1, slice(cut) if side == "left" else slice(-cut, None)] = 0
    return mask


def inputs(side: str = "none") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    source, target = (rng.integers(6, 96, (2, size)).astype(np.int32) for size in (40, 28))
    return {
        "input_ids": source,
        "decoder_input_ids": target,
        "attention_mask": padding(source, side),
        "decoder_attention_mask": padding(target, side),
    }


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(x).long() for name, x in batch.items()}


def peer_logits(model: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return model(**tensors(batch)).logits.numpy()


def logits(model: Seq2SeqModel, params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)(params, **batch))


def close(ours: Any, theirs: Any, atol: float = 1e-4) -> None:
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant, tmp_path):
    peer = random_model(variant)
    peer.save_pretrained(tmp_path)
    model = qj.load(tmp_path)
    for side in ("none", "left", "right"):
        batch = inputs(side)
        real = batch["decoder_attention_mask"].astype(bool)
        close(logits(model, model.params, batch)[real], peer_logits(peer, batch)[real])


@pytest.mark.parametrize("variant", ["v1.0", "uneven"])
def test_packed_pairs_are_as_if_alone(variant, tmp_path):
    """Three pairs of texts in one row here, each in a row of its own there."""
    peer = random_model(variant)
    peer.save_pretrained(tmp_path)
    model = qj.load(tmp_path)
    batch = inputs()
    source, target = batch["input_ids"][:1], batch["decoder_input_ids"][:1]
    ends = [(0, 0), (13, 5), (20, 19), (40, 28)]
    of_source, of_target = np.zeros_like(source), np.zeros_like(target)
    apart = []
    for number, ((a, b), (c, d)) in enumerate(zip(ends[:-1], ends[1:], strict=True), start=1):
        of_source[:, a:c], of_target[:, b:d] = number, number
        pair = {"input_ids": source[:, a:c], "decoder_input_ids": target[:, b:d]}
        apart.append(peer_logits(peer, pair))
    ours = jax.jit(model.apply)(
        model.params, source, target, segment_ids=of_source, decoder_segment_ids=of_target
    )
    close(ours, np.concatenate(apart, axis=1))


def labels() -> np.ndarray:
    labels = inputs()["decoder_input_ids"].copy()
    labels[0, :3], labels[1, -9:] = -100, -100
    return labels


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(variant, tmp_path):
    """Of every parameter, the shared table by way of all its uses."""
    peer = random_model(variant)
    peer.save_pretrained(tmp_path)
    model = qj.load(tmp_path)
    batch = inputs("right") | {"labels": labels()}
    del batch["decoder_input_ids"], batch["decoder_attention_mask"]
    theirs = peer(**tensors(batch)).loss
    theirs.backward()

    def loss(params: Any) -> jax.Array:
        total, tokens = model.loss(params, batch, remat=True)
        return total / tokens

    ours, gradients = jax.jit(jax.value_and_grad(loss))(model.params)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    by_name, leaves = dict(peer.named_parameters()), named_leaves(gradients)
    for parameter in parameters(model.config):
        for layer in range(parameter.layers):
            expected = by_name[parameter.hf_name(layer)].grad.numpy()
            found = parameter.to_file(np.asarray(leaves[parameter.path][parameter.at(layer)]))
            size = np.abs(expected).max()
            assert size > 0, parameter.hf_name(layer)
            assert np.abs(found - expected).max() <= 1e-3 * size, parameter.hf_name(layer)


# A random model that is tied says the same word over and over.
@pytest.mark.parametrize("variant", ["v1.1", "uneven"])
def test_greedy_generation(variant, tmp_path):
    peer = random_model(variant)
    peer.save_pretrained(tmp_path)
    model = qj.load(tmp_path)
    batch = inputs("left")
    peer.generation_config.eos_token_id = None
    with torch.no_grad():
        theirs = peer.generate(
            **tensors({name: batch[name] for name in ("input_ids", "attention_mask")}),
            max_new_tokens=64,
            do_sample=False,
        ).numpy()
    rows = zip(batch["input_ids"], batch["attention_mask"].astype(bool), strict=True)
    prompts = [ids[mask].tolist() for ids, mask in rows]
    ours = generate(model, prompts, Sampling(max_new_tokens=64), stop=())
    assert ours == theirs[:, 1:].tolist() and len(ours[0]) == 64
    assert len(set(ours[0])) > 8


@pytest.mark.parametrize("buckets, distance", [(4, 3), (8, 20), (32, 128), (33, 100), (64, 1000)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets(buckets, distance, bidirectional):
    distances = np.arange(-1200, 1200)
    attention = transformers.models.t5.modeling_t5.T5Attention
    theirs = attention._relative_position_bucket(
        torch.from_numpy(distances), bidirectional, buckets, distance
    )
    ours = relative_buckets(
        distances, buckets=buckets, max_distance=distance, bidirectional=bidirectional
    )
    np.testing.assert_array_equal(ours, theirs.numpy())


def base(folder: Path, variant: str) -> tuple[Seq2SeqModel, Any]:
    """Our 4-bit model, and the very same weights dense in transformers."""
    random_model(variant).save_pretrained(folder / "base")
    model = qj.load(folder / "base", quantization=qj.NF4())
    save_pretrained(folder / "dense", model, dtype=jnp.float32)
    return model, load_peer(folder / "dense")


def load_peer(folder: Path) -> Any:
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("variant", ["v1.0", "uneven"])
def test_ours_trained_loaded_by_peft_and_merged(variant, tmp_path):
    """A few 4-bit train steps here; the adapter in PEFT, and the merged checkpoint."""
    model, peer = base(tmp_path, variant)
    config = qj.LoraConfig(rank=4, alpha=8)
    adapters = qj.lora.init(jax.random.key(0), model.params, config)
    optimizer = optax.adamw(1e-2)
    state = qj.TrainState.create(adapters, optimizer)
    step = qj.make_train_step(model.loss, optimizer)
    batch = {"input_ids": inputs()["input_ids"], "labels": labels()}
    losses = []
    for _ in range(5):
        state, metrics = step(state, model.params, batch)
        losses.append(float(metrics["loss"]))
    with torch.no_grad():
        np.testing.assert_allclose(losses[0], peer(**tensors(batch)).loss.item(), rtol=1e-5)
    assert losses[-1] < 0.9 * losses[0]

    tree = qj.lora.attach(model.params, state.adapters)
    ours = logits(model, tree, inputs("left"))
    assert np.abs(ours - logits(model, model.params, inputs("left"))).max() > 0.1
    real = inputs("left")["decoder_attention_mask"].astype(bool)
    save_pretrained(tmp_path / "merged", model, tree, dtype=jnp.float32)
    close(ours[real], peer_logits(load_peer(tmp_path / "merged"), inputs("left"))[real])

    qj.peft.save(tmp_path / "adapter", state.adapters, model, config)
    loaded = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    assert isinstance(loaded, peft.PeftModelForSeq2SeqLM)
    close(ours[real], peer_logits(loaded, inputs("left"))[real])


@pytest.mark.parametrize("targets", ["all-linear", ["q", "wi_0"]])
def test_pefts_loaded_here_and_written_again(targets, tmp_path):
    model, peer = base(tmp_path, "uneven")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    torch.manual_seed(1)
    trained = peft.get_peft_model(peer, config).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapters, _ = qj.peft.load(tmp_path / "adapter", model)
    batch = inputs("right")
    real = batch["decoder_attention_mask"].astype(bool)
    ours = logits(model, qj.lora.attach(model.params, adapters), batch)
    assert np.abs(ours - logits(model, model.params, batch)).max() > 0.1
    close(ours[real], peer_logits(trained, batch)[real])
    qj.peft.save(tmp_path / "again", adapters, model)
    again = peft.PeftModel.from_pretrained(load_peer(tmp_path / "dense"), tmp_path / "again")
    close(ours[real], peer_logits(again.eval(), batch)[real])
