"""Any decoder beside transformers' of the same random weights: what every family has to pass.

A family's test makes a `Pair` of a small configuration that transformers knows, and calls checks.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
import transformers
from safetensors.numpy import load_file

import qlora_jax as qj
from qlora_jax.checkpoints.export import save_pretrained
from qlora_jax.checkpoints.names import parameters
from qlora_jax.generation import Sampling, generate

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
"""Settings of a small model, by the names that most families have for them."""
CASES = ("whole", "left", "right", "packed")
"""A batch without padding, with some before or after a sequence, and of several documents a row."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """transformers' model and ours, of the weights in `folder`."""

    peer: Any
    model: qj.Model
    folder: Path


def pair(config: Any, folder: Path) -> Pair:
    """Both models of a transformers configuration; the weights are written to `folder`."""
    peer = random_peer(config)
    peer.save_pretrained(folder)
    return Pair(peer, qj.load(folder), folder)


def random_peer(config: Any) -> Any:
    """transformers' model with nothing at zero or one: biases and norms are random too."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.initializer_range = 0.2
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return peer.eval()


def load_peer(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@dataclasses.dataclass(frozen=True)
class Batch:
    """ids [2, 40], which document each token is of (0: padding), and labels (-100: ignored)."""

    ids: np.ndarray
    segments: np.ndarray
    labels: np.ndarray

    @property
    def real(self) -> np.ndarray:
        return self.segments > 0


def batch(case: str) -> Batch:
    """Random tokens of one of CASES."""
    ids = np.random.default_rng(0).integers(3, 96, size=(2, 40)).astype(np.int32)
    segments = np.ones_like(ids)
    if case == "left":
        segments[1, :9] = 0
    elif case == "right":
        segments[1, -9:] = 0
    elif case == "packed":
        segments[0, 17:] = 2
        segments[1] = np.repeat([1, 2, 3, 0], [11, 1, 24, 4])
    # A document's first token is predicted by nothing that a model must answer for.
    follows = np.pad(segments[:, :-1] == segments[:, 1:], [(0, 0), (1, 0)]) & (segments > 0)
    return Batch(ids, segments, np.where(follows, ids, -100))


def peer_inputs(peer: Any, given: Batch) -> dict[str, Any]:
    """What transformers takes: a mask of two axes if each row is one document, else of four."""
    segments, time = given.segments, np.arange(given.ids.shape[1])
    new = np.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)])
    positions = time - np.maximum.accumulate(np.where(new, time, 0), axis=1)
    inputs = {"input_ids": torch.from_numpy(given.ids).long()}
    inputs["position_ids"] = torch.from_numpy(positions).long()
    if segments.max() == 1:
        return inputs | {"attention_mask": torch.from_numpy(segments).long()}
    seen = (segments[:, :, None] == segments[:, None, :]) & (time[:, None] >= time[None, :])
    window = getattr(peer.config, "sliding_window", None) or len(time)
    near = seen & (time[:, None] - time[None, :] < window)
    full, near = (_additive(mask) for mask in (seen, near))
    if getattr(peer.config, "layer_types", None):
        return inputs | {"attention_mask": {"full_attention": full, "sliding_attention": near}}
    return inputs | {"attention_mask": near}


def _additive(mask: np.ndarray) -> torch.Tensor:
    """[B, T, T] bool -> [B, 1, T, T], zero where a key is seen."""
    lowest = np.finfo(np.float32).min
    return torch.from_numpy(np.where(mask, np.float32(0), lowest)[:, None])


def peer_logits(peer: Any, given: Batch) -> np.ndarray:
    with torch.no_grad():
        return peer(**peer_inputs(peer, given)).logits.numpy()


def logits(model: qj.Model, params: Any, given: Batch) -> np.ndarray:
    one_each = given.segments.max() == 1
    how = {"attention_mask": given.real} if one_each else {"segment_ids": given.segments}
    return np.asarray(jax.jit(model.apply)(params, given.ids, **how)[0])


def check_logits_and_gradients(both: Pair, tmp_path: Path) -> None:
    """Of every case: logits within 1e-4, the loss' gradients within 1e-3 of the largest entry."""
    model = both.model

    def loss(params: Any, ids: Any, real: Any, segments: Any, labels: Any) -> Any:
        logits, _ = model.apply(params, ids, attention_mask=real, segment_ids=segments)
        targets = jnp.maximum(labels, 0)[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
        return jnp.sum(losses, where=labels[:, 1:] >= 0), logits

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for case in CASES:
        given = batch(case)
        (_, ours), ours_gradients = run(
            model.params, given.ids, given.real, given.segments, given.labels
        )
        expected, gradients = _peer_gradients(both.peer, given, tmp_path / case)
        assert np.abs(expected[given.real]).max() > 0.5
        np.testing.assert_allclose(
            np.asarray(ours)[given.real], expected[given.real], rtol=0, atol=1e-4, err_msg=case
        )
        _compare_gradients(model, ours_gradients, gradients, case)


def _peer_gradients(
    peer: Any, given: Batch, folder: Path
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and the gradients by the names that a checkpoint has for the parameters."""
    peer = copy.deepcopy(peer)
    logits = peer(**peer_inputs(peer, given)).logits
    labels = torch.from_numpy(given.labels).long()
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return logits.detach().numpy(), _gradients_as_weights(peer, loss, folder)


def _gradients_as_weights(peer: Any, loss: torch.Tensor, folder: Path) -> dict[str, np.ndarray]:
    """transformers may hold what are several tensors of a file as one parameter: written as if they
    were weights, gradients have the names of a checkpoint."""
    loss.backward()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(0 if parameter.grad is None else parameter.grad)
    peer.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def check_own_loss(both: Pair, tmp_path: Path) -> list[float]:
    """The mean of `model.loss` is the loss that transformers' model returns, within 1e-4, and so
    are its gradients within 1e-3 of the largest entry. The losses of the cases, each one document a
    row."""
    model = both.model

    def mean(params: Any, batch: Any) -> Any:
        total, tokens = model.loss(params, batch)
        return total / tokens

    run, losses = jax.jit(jax.value_and_grad(mean)), []
    for case in ("whole", "left", "right"):
        given = batch(case)
        labels = np.where(given.ids % 5 == 0, -100, given.labels)
        fed = {"input_ids": given.ids, "labels": labels, "attention_mask": given.real}
        ours, ours_gradients = run(model.params, fed)
        peer = copy.deepcopy(both.peer)
        loss = peer(**peer_inputs(peer, given), labels=torch.from_numpy(labels).long()).loss
        np.testing.assert_allclose(ours, loss.item(), rtol=0, atol=1e-4, err_msg=case)
        gradients = _gradients_as_weights(peer, loss, tmp_path / f"own {case}")
        _compare_gradients(model, ours_gradients, gradients, case)
        losses.append(float(ours))
    return losses


def _compare_gradients(
    model: qj.Model, ours: Any, theirs: dict[str, np.ndarray], case: str
) -> None:
    leaves = qj.lora.adapters.named_leaves(ours)
    # A key's bias that all keys share changes no probability: its gradient is rounding alone.
    noise = 1e-6 * max(np.abs(x).max() for x in theirs.values())
    for parameter in parameters(model.config):
        for layer in range(parameter.layers):
            name = parameter.hf_name(layer)
            found = parameter.to_file(np.asarray(leaves[parameter.path][parameter.at(layer)]))
            allowed = 1e-3 * np.abs(theirs[name]).max() + noise
            np.testing.assert_allclose(
                found, theirs[name], rtol=0, atol=allowed, err_msg=f"{case}: {name}"
            )


def check_greedy(both: Pair, tokens: int = 64) -> None:
    """Prompts of several lengths, continued together here and one by one there, token for token."""
    ids = np.random.default_rng(1).integers(3, 96, size=16).tolist()
    prompts = [ids, ids[:5], ids[3:14]]
    ours = generate(both.model, prompts, Sampling(max_new_tokens=tokens), stop=())
    both.peer.generation_config.eos_token_id = None
    for prompt, found in zip(prompts, ours, strict=True):
        given = torch.tensor([prompt])
        whole = both.peer.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=tokens
        )
        assert found == whole[0, len(prompt) :].tolist()


def four_bit(folder: Path, tmp_path: Path) -> tuple[qj.Model, Path]:
    """Our 4-bit model of a checkpoint, and a folder of the very same weights, dense."""
    model = qj.load(folder, quantization=qj.NF4())
    save_pretrained(tmp_path / "dense", model, dtype=jnp.float32)
    return model, tmp_path / "dense"


def check_adapters(folder: Path, tmp_path: Path, config: qj.LoraConfig | None = None) -> None:
    """Trained on the 4-bit base here, run by PEFT on the dense one; saved by PEFT, loaded here.

    Then merged and written, and read by transformers.
    """
    config = config or qj.LoraConfig(rank=4, alpha=8)
    model, dense = four_bit(folder, tmp_path)
    adapters = qj.lora.init(jax.random.key(0), model.params, config)
    optimizer = optax.adamw(3e-2)
    state = qj.TrainState.create(adapters, optimizer)
    step = qj.make_train_step(model.loss, optimizer)
    given, losses = batch("left"), []
    for _ in range(4):
        fed = {
            "input_ids": given.ids, "labels": given.labels, "attention_mask": given.real,
        }  # fmt: skip
        state, metrics = step(state, model.params, fed)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.02, losses

    qj.peft.save(tmp_path / "adapter", state.adapters, model, config)
    trained = peft.PeftModel.from_pretrained(load_peer(dense), tmp_path / "adapter").eval()
    tree, real = qj.lora.attach(model.params, state.adapters), given.real
    ours = logits(model, tree, given)[real]
    assert np.abs(ours - logits(model, model.params, given)[real]).max() > 0.1
    np.testing.assert_allclose(ours, peer_logits(trained, given)[real], rtol=0, atol=1e-4)

    trained.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    adapters, _ = qj.peft.load(tmp_path / "again", model)
    again = logits(model, qj.lora.attach(model.params, adapters), given)[real]
    np.testing.assert_allclose(again, ours, rtol=0, atol=1e-5)

    save_pretrained(tmp_path / "merged", model, tree, dtype=jnp.float32)
    merged = peer_logits(load_peer(tmp_path / "merged"), given)[real]
    np.testing.assert_allclose(merged, ours, rtol=0, atol=1e-4)
