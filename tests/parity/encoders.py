"""What the comparisons of encoders with transformers share: random models, inputs, both answers."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch

import qlora_jax as qj
from qlora_jax.checkpoints.export import save_pretrained
from qlora_jax.checkpoints.names import parameters
from qlora_jax.lora.adapters import named_leaves

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
TIME = 24


def random_model(make: Any, config: Any) -> Any:
    """A model with nothing at zero or one: biases and norms are random too."""
    torch.manual_seed(0)
    model = make(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or "bias" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def batch(config: Any, padding: str) -> dict[str, np.ndarray]:
    """Three rows of which the last two are padded, on the `padding` side."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, config.vocab_size, (3, TIME)).astype(np.int32)
    mask = np.ones_like(ids)
    if padding == "left":
        mask[1, :7] = mask[2, :1] = 0
    if padding == "right":
        mask[1, -7:] = mask[2, -1:] = 0
    types = np.sort(rng.integers(0, max(config.type_vocab_size, 1), ids.shape), axis=1)
    return {
        "input_ids": np.where(mask, ids, config.pad_token_id).astype(np.int32),
        "attention_mask": mask,
        "token_type_ids": types.astype(np.int32),
    }


def labels(config: Any, name: str, kind: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What the head `name` is trained on; kind: which labels a classification has."""
    rng = np.random.default_rng(1)
    rows, count = len(inputs["input_ids"]), config.num_labels
    if name.endswith("MaskedLM"):
        shape = inputs["input_ids"].shape
        masked = (rng.random(shape) < 0.3) & inputs["attention_mask"].astype(bool)
        return np.where(masked, rng.integers(0, config.vocab_size, shape), -100)
    if kind == "classes":
        return np.asarray([*rng.integers(0, count, rows - 1), -100])
    if kind == "true or false":
        return rng.integers(0, 2, (rows, count)).astype(np.float32)
    return rng.random((rows, count) if count > 1 else rows, np.float32)


def to_torch(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    whole = {n: x.astype(np.int64) if x.dtype.kind == "i" else x for n, x in inputs.items()}
    return {name: torch.from_numpy(x) for name, x in whole.items()}


def peer_logits(peer: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return peer(**to_torch(inputs)).logits.numpy()


def logits(model: Any, params: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)(params, **inputs))


def compare(model: Any, peer: Any, name: str, kind: str) -> None:
    """Logits without padding and with it, on either side; the mean loss and its whole gradient."""

    # Most of the time goes into compiling, and little into running what is so small.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def ours(params: Any, inputs: Any) -> Any:
        def mean(params: Any) -> Any:
            total, count = model.loss(params, inputs)
            plain = {key: x for key, x in inputs.items() if key != "labels"}
            return total / count, model.apply(params, **plain)

        return jax.value_and_grad(mean, has_aux=True)(params)

    for padding in ("none", "left", "right"):
        inputs = batch(peer.config, padding)
        inputs["labels"] = labels(peer.config, name, kind, inputs)
        (loss, found), gradients = ours(model.params, inputs)
        peer.zero_grad()
        theirs = peer(**to_torch(inputs))
        theirs.loss.backward()
        expected = theirs.logits.detach().numpy()
        # DeBERTa drops the axis of a single label.
        expected = expected.reshape(found.shape)
        where = inputs["attention_mask"].astype(bool) if expected.ndim == 3 else ...
        assert np.abs(expected[where]).max() > 0.5
        np.testing.assert_allclose(np.asarray(found)[where], expected[where], rtol=0, atol=1e-4)
        np.testing.assert_allclose(float(loss), theirs.loss.item(), rtol=1e-5)
    compare_gradients(model.config, gradients, peer)


def compare_gradients(config: Any, gradients: Any, peer: Any) -> None:
    """By every parameter of the model, relative to the largest of the parameter's."""
    ours = named_leaves(gradients)
    stored = {n: x.grad.numpy() for n, x in peer.named_parameters() if x.grad is not None}
    for parameter in parameters(config):
        for layer in range(parameter.layers):
            name = parameter.hf_name(layer)
            found = parameter.to_file(np.asarray(ours[parameter.path][parameter.at(layer)]))
            expected = stored.pop(name, np.zeros_like(found))
            # A key's bias moves all scores of a query alike: its gradient is rounding alone.
            scale = max(np.abs(expected).max(), 1e-3)
            worst = np.abs(found - expected).max() / scale
            assert worst < 1e-3, f"{name}: {worst:.1e} of {scale:.1e}"
    assert not stored, f"never compared: {sorted(stored)}"


def packed(config: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Documents packed in a row, and what transformers calls it: mask [B, 1, T, T], positions."""
    ids = batch(config, "none")["input_ids"]
    segments = np.repeat([[0] * 9 + [1] * 5 + [2] * (TIME - 14)], len(ids), axis=0)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    positions = np.concatenate([np.arange(9), np.arange(5), np.arange(TIME - 14)])
    ours = {"input_ids": ids, "segment_ids": segments.astype(np.int32)}
    return ours, {"mask": same, "positions": np.repeat(positions[None], len(ids), axis=0)}


def load_peer(make: Any, folder: Any) -> Any:
    """The model in a folder, which must hold every tensor of it."""
    peer, info = make.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return peer.eval()


def check_adapter_and_export(make: Any, peer: Any, folder: Path) -> None:
    """PEFT's SEQ_CLS adapters both ways over the same 4-bit base, and the merged checkpoint.

    make: the peer's class. Here the head is trained in full, all linear layers get adapters.
    """
    peer.save_pretrained(folder / "base")
    model = qj.load(folder / "base", quantization=qj.NF4())
    save_pretrained(folder / "dense", model, dtype=jnp.float32)
    inputs = batch(peer.config, "right")
    apply = jax.jit(model.apply)
    config = qj.LoraConfig(rank=4, alpha=8, modules_to_save=("classifier",))
    adapters = qj.lora.init(jax.random.key(0), model.params, config)
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)

    def with_adapters(adapters: Any) -> np.ndarray:
        return np.asarray(apply(qj.lora.attach(model.params, adapters), **inputs))

    qj.peft.save(folder / "ours", adapters, model, config)
    loaded = peft.PeftModel.from_pretrained(load_peer(make, folder / "dense"), folder / "ours")
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    ours = with_adapters(adapters)
    assert np.abs(ours - np.asarray(apply(model.params, **inputs))).max() > 0.1
    np.testing.assert_allclose(ours, peer_logits(loaded.eval(), inputs), rtol=0, atol=1e-4)

    save_pretrained(
        folder / "merged", model, qj.lora.attach(model.params, adapters), dtype=jnp.float32
    )
    merged = load_peer(make, folder / "merged")
    np.testing.assert_allclose(ours, peer_logits(merged, inputs), rtol=0, atol=1e-4)

    torch.manual_seed(1)
    query = "query" if hasattr(merged, "roberta") else "query_proj"
    trained = peft.get_peft_model(
        load_peer(make, folder / "dense"),
        peft.LoraConfig(r=2, lora_alpha=6, task_type="SEQ_CLS", target_modules=[query, "dense"]),
    ).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained.save_pretrained(folder / "theirs")
    theirs, _ = qj.peft.load(folder / "theirs", model)
    expected = peer_logits(trained, inputs)
    assert any(path.startswith("classifier/") for path in theirs)
    np.testing.assert_allclose(with_adapters(theirs), expected, rtol=0, atol=1e-4)
