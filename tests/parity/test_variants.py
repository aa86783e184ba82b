"""Variants of LoRA beside PEFT's, over the same base and from the same adapter."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.vera.model import _kaiming_init
from peft.utils import loftq_utils
from safetensors.numpy import load_file

import qlora_jax as qj
from qlora_jax.checkpoints.export import save_pretrained
from qlora_jax.lora import decompose
from qlora_jax.lora.vera import draw_projections
from qlora_jax.training.lora_plus import lora_plus
from qlora_jax.training.masks import combine, partition
from tests.parity.decoders import (
    SMALL,
    Batch,
    batch,
    four_bit,
    load_peer,
    logits,
    pair,
    peer_inputs,
    peer_logits,
)
from tests.parity.peer import to_torch
from tests.parity.test_transformers import peer_config

pytestmark = pytest.mark.standard_promotion

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
VERA: dict[str, Any] = {"r": 6, "task_type": "CAUSAL_LM"}
ALL = "all-linear"
PEFT = {
    "rslora": lambda: peft.LoraConfig(**LORA, use_rslora=True, target_modules=ALL),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True, target_modules=ALL),
    "dora, patterns": lambda: peft.LoraConfig(
        **LORA,
        use_dora=True,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 3},
        modules_to_save=["norm"],
    ),
    "dora, embedding": lambda: peft.LoraConfig(
        **LORA, use_dora=True, target_modules=["embed_tokens", "k_proj"]
    ),
    "vera": lambda: peft.VeraConfig(**VERA, target_modules=ALL),
    "vera, drawn again": lambda: peft.VeraConfig(
        **VERA, target_modules=["v_proj", "up_proj"], projection_prng_key=7, save_projection=False
    ),
}
CASES = {**dict.fromkeys(PEFT, "llama 3"), "dora": "llama, biases"}


def disturbed(peer: Any, config: Any) -> Any:
    """PEFT's model with an adapter in which nothing is zero."""
    torch.manual_seed(1)
    model = peft.get_peft_model(peer, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def peer_loss(peer: Any, given: Batch) -> torch.Tensor:
    out = peer(**peer_inputs(peer, given)).logits
    labels = torch.from_numpy(given.labels).long()
    return torch.nn.functional.cross_entropy(
        out[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )


def fed(given: Batch) -> dict[str, Any]:
    return {"input_ids": given.ids, "labels": given.labels, "attention_mask": given.real}


def compare(model: qj.Model, adapters: Any, config: Any, peer: Any, tmp_path: Path) -> None:
    """Logits within 1e-4, the gradient of every trained tensor within 1e-3 of its largest entry."""
    given = batch("left")
    trained, fixed = partition(adapters, qj.lora.trained_mask(adapters))

    def loss(trained: Any) -> Any:
        tree = qj.lora.attach(model.params, combine(trained, fixed))
        out = model.apply(tree, given.ids, attention_mask=given.real)[0]
        labels = np.maximum(given.labels, 0)[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(out[:, :-1], labels)
        return jnp.sum(losses, where=given.labels[:, 1:] >= 0), out

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(trained)
    ours, theirs = np.asarray(ours)[given.real], peer_logits(peer, given)[given.real]
    with peer.disable_adapter():
        assert np.abs(theirs - peer_logits(peer, given)[given.real]).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    gradients = combine(gradients, fixed)
    # Written as if they were adapters, so that both have PEFT's names.
    if isinstance(config, qj.VeraConfig):
        config = dataclasses.replace(config, save_projection=False)
    qj.peft.save(tmp_path / "ours", gradients, model, config)
    peer_loss(peer, given).backward()
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    peer.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    theirs = {
        name: x for name, x in theirs.items() if "vera_A" not in name and "vera_B" not in name
    }
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        largest = np.abs(x).max()
        assert largest > 0, name
        # Of a layer of lower rank ours is padded: what it is padded with has no gradient.
        x = np.pad(
            x, [(0, have - own) for have, own in zip(ours[name].shape, x.shape, strict=True)]
        )
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=1e-3 * largest, err_msg=name)


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("name", PEFT)
def test_pefts_adapter(name, tmp_path):
    """Made there, read, run and differentiated here over 4 bits; written here, read there."""
    model, dense = four_bit(pair(peer_config(CASES[name]), tmp_path / "base").folder, tmp_path)
    peer = disturbed(load_peer(dense), PEFT[name]())
    peer.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapters, config = qj.peft.load(tmp_path / "adapter", model)
    qj.peft.save(tmp_path / "again", adapters, model, config)
    again = peft.PeftModel.from_pretrained(load_peer(dense), tmp_path / "again").eval()
    given = batch("whole")
    np.testing.assert_allclose(
        peer_logits(again, given), peer_logits(peer, given), rtol=0, atol=1e-5
    )
    if name in ("dora", "vera"):
        merged = qj.lora.merge(model.params, adapters)
        np.testing.assert_allclose(
            logits(model, merged, given), peer_logits(peer, given), rtol=0, atol=1e-4
        )
    compare(model, adapters, config, peer, tmp_path)


@pytest.mark.parametrize("name", ["dora", "vera"])
def test_new_adapters_start_as_pefts(name, tmp_path):
    """Whatever is not drawn at random is the same; DoRA's magnitudes are those of 4-bit weights."""
    model, dense = four_bit(pair(peer_config("llama 3"), tmp_path / "base").folder, tmp_path)
    peft.get_peft_model(load_peer(dense), PEFT[name]()).save_pretrained(tmp_path / "theirs")
    config = {
        "dora": qj.LoraConfig(rank=4, alpha=8, dora=True),
        "vera": qj.VeraConfig(rank=6),
    }[name]
    adapters = qj.lora.init(jax.random.key(0), model.params, config)
    qj.peft.save(tmp_path / "ours", adapters, model, config)
    ours, theirs = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        if not key.endswith("lora_A.weight"):
            np.testing.assert_allclose(ours[key], x, rtol=1e-6, atol=0, err_msg=key)


@pytest.mark.parametrize("number", [0, 3, 2**40 + 5])
def test_projections_are_those_that_peft_draws(number):
    generator = torch.Generator().manual_seed(number)
    a = _kaiming_init((7, 130), generator=generator)
    b = _kaiming_init((90, 7), generator=generator)
    ours = draw_projections(number, 130, 90, 7)
    np.testing.assert_array_equal(ours.a.T, a.numpy())
    np.testing.assert_array_equal(ours.b.T, b.numpy())


def test_dropout_under_dora():
    """PEFT's layer with our masks in place of its own."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_dora=True, lora_dropout=0.5, target_modules=["0"]
    )
    peer = disturbed(torch.nn.Sequential(torch.nn.Linear(64, 48)), config)
    layer = peer.base_model.model[0]
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    base = jnp.asarray(layer.base_layer.weight.detach().numpy().T)
    weights = qj.lora.LoraWeights(
        *(
            jnp.asarray(getattr(layer, name)["default"].weight.detach().numpy().T)
            for name in ("lora_A", "lora_B")
        ),
        2.0,
        magnitude=jnp.asarray(layer.lora_magnitude_vector["default"].weight.detach().numpy()),
        base_norms=jnp.linalg.norm(base, axis=0),
    )
    tree = qj.lora.attach({"w": base}, {"w": weights}, dropout=0.5, key=jax.random.key(0))
    keep = np.array(jax.random.bernoulli(tree["w"].dropout_key, 0.5, x.shape))

    class Masked(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.from_numpy(2 * keep.astype(np.float32))

    layer.lora_dropout["default"] = Masked()
    there = layer.train()(torch.from_numpy(x)) - layer.base_layer.bias
    ours = qj.lift(lambda p, x: x @ p["w"], strict=True)(tree, x)
    np.testing.assert_allclose(ours, there.detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantization", [None, qj.NF4()], ids=["dense", "nf4"])
def test_pissa(quantization, tmp_path):
    """The parts are PEFT's; its forward and gradients over what is left, in 4 bits too."""
    both = pair(peer_config("llama 3"), tmp_path / "base")
    config = qj.LoraConfig(rank=4, alpha=8, init="pissa")
    params, adapters = qj.lora.init_quantized(
        jax.random.key(0), both.model.params, config, quantization
    )
    model = dataclasses.replace(both.model, params=params)
    theirs = peft.get_peft_model(
        load_peer(both.folder),
        peft.LoraConfig(**LORA, init_lora_weights="pissa", target_modules=ALL),
    )
    for layer in range(SMALL["num_hidden_layers"]):
        there = theirs.base_model.model.model.layers[layer].mlp.down_proj
        path = "layers/mlp/down_proj/kernel"
        product = np.asarray(adapters[path].a[layer] @ adapters[path].b[layer])
        with torch.no_grad():
            expected = there.lora_B["default"].weight @ there.lora_A["default"].weight
            rest = there.base_layer.weight.numpy().T
        # Singular values lie close together here, which lets the vectors turn a little.
        np.testing.assert_allclose(product, expected.numpy().T, rtol=0, atol=1e-4)
        if quantization is None:
            ours = params["layers"]["mlp"]["down_proj"]["kernel"][layer]
            np.testing.assert_allclose(ours, rest, rtol=0, atol=1e-4)
    save_pretrained(tmp_path / "rest", model, dtype=jnp.float32)
    qj.peft.save(tmp_path / "adapter", adapters, model, config)
    peer = peft.PeftModel.from_pretrained(
        load_peer(tmp_path / "rest"), tmp_path / "adapter", is_trainable=True
    ).eval()
    compare(model, adapters, config, peer, tmp_path)


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq(iterations, monkeypatch):
    """PEFT's function, which asks for a GPU that there need not be."""
    to = torch.Tensor.to

    def on_cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        cuda = [isinstance(x, str | torch.device) and str(x) == "cuda" for x in args]
        args = tuple("cpu" if there else x for x, there in zip(args, cuda, strict=True))
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", on_cpu)
    w = np.random.default_rng(0).normal(size=(96, 128)).astype(np.float32)
    expected = loftq_utils.loftq_init(to_torch(w), 4, 8, iterations)
    dense, a, b = (x.detach().numpy() for x in expected)
    quantized, *factors = decompose.loftq(
        jnp.asarray(w.T), 8, 1.0, qj.NF4(double_quant=False), iterations
    )
    ours = np.asarray(quantized.dequantize()).T, np.asarray(factors[0] @ factors[1]).T
    # Rounding may move a few numbers of later rounds across a threshold.
    assert np.mean(np.abs(ours[0] - dense) > 1e-4) <= (0 if iterations == 1 else 0.01)
    np.testing.assert_allclose(ours[1], b @ a, rtol=0, atol=1e-5 if iterations == 1 else 0.05)
    left = [np.linalg.norm(w - x - y) for x, y in (ours, (dense, b @ a))]
    assert left[0] == pytest.approx(left[1], rel=1e-3)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_lora_plus(dora, tmp_path):
    """Three steps of AdamW with 16 times the rate for B."""
    model, dense = four_bit(pair(peer_config("llama 3"), tmp_path / "base").folder, tmp_path)
    config = peft.LoraConfig(**LORA, use_dora=dora, target_modules=ALL)
    peer = disturbed(load_peer(dense), config)
    peer.save_pretrained(tmp_path / "adapter")
    adapters, ours = qj.peft.load(tmp_path / "adapter", model)
    assert isinstance(ours, qj.LoraConfig) and ours.dora == dora
    given = batch("whole")
    torch_optimizer = create_loraplus_optimizer(
        peer, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    optimizer = lora_plus(optax.adamw(1e-3, weight_decay=0.1), 16.0)
    state = qj.TrainState.create(adapters, optimizer)
    step = qj.make_train_step(model.loss, optimizer)
    tokens = int((given.labels[:, 1:] >= 0).sum())
    for _ in range(3):
        torch_optimizer.zero_grad()
        (peer_loss(peer, given) / tokens).backward()
        torch_optimizer.step()
        state, _ = step(state, model.params, fed(given))
    peer.save_pretrained(tmp_path / "theirs")
    qj.peft.save(tmp_path / "ours", state.adapters, model)
    before, theirs, found = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("adapter", "theirs", "ours")
    )
    for name, x in theirs.items():
        moved = np.linalg.norm(x - before[name])
        rate = 1e-3 if "lora_A" in name else 16e-3
        assert 0.3 * rate < moved / math.sqrt(x.size) < 4 * rate, name
        # Adam divides by gradients' own size: where that is tiny, rounding decides.
        assert np.linalg.norm(found[name] - x) < 0.02 * moved, name
