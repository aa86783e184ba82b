"""A QLoRA run as PEFT does it, written to a folder: what our training must reproduce.

    python -m tests.parity.make_reference_run MODEL BATCHES.npz OUT

MODEL is a Hugging Face folder or a GGUF file; BATCHES.npz holds input_ids, labels (-100: ignored,
not shifted) and attention_mask, each [steps + 1, B, T], the last one held out. OUT gets

    adapter_start.safetensors, adapter_config.json    the adapter before the first step
    batches.npz                                       as given
    log.json                                          losses and gradient norms (before clipping)
    logits.npz                                        of row 0 of the held-out batch, twice

Everything is fp32. Every linear weight but the head is quantized by bitsandbytes (NF4, blocks of
64, double quantization) and dequantized once; LoRA then runs on dense weights. bitsandbytes' own
CPU matmul is not used: it drops gradients after a first call in eval mode.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from tests.parity import peer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a run; the optimizer is AdamW without weight decay, constant rate."""

    rank: int = 16
    alpha: int = 32
    learning_rate: float = 2e-4
    max_grad_norm: float = 0.3
    seed: int = 0


def load(path: Path) -> Any:
    """The causal language model in a Hugging Face folder or a GGUF file, fp32."""
    source, extra = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **extra)


def round_to_4_bits(model: Any) -> None:
    """Quantize and dequantize every linear weight but the head, in place."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            weight = module.weight.detach().numpy()
            answer = peer.quantize(weight, "nf4", 64, double_quant=True)
            module.weight.data = torch.from_numpy(answer["dense"].copy())


def write(out: Path, model: Any, batches: dict[str, np.ndarray], settings: Settings) -> None:
    """Round `model` in place, train an adapter on `batches`, write the folder."""
    out.mkdir(parents=True, exist_ok=True)
    round_to_4_bits(model)
    torch.manual_seed(settings.seed)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=LINEAR,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    model.train()
    model.save_pretrained(out)
    (out / "adapter_model.safetensors").rename(out / "adapter_start.safetensors")
    np.savez_compressed(out / "batches.npz", **batches)

    steps = len(batches["input_ids"]) - 1
    length = int(batches["attention_mask"][-1, 0].sum())
    positions = np.unique(np.linspace(0, length - 1, min(12, length)).astype(np.int64))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    before = _logits(model, batches, positions)
    losses, norms = [], []
    for step in range(steps):
        loss = model(**_batch(batches, step)).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    after = _logits(model, batches, positions)

    (out / "log.json").write_text(json.dumps({"losses": losses, "grad_norms": norms}, indent=1))
    np.savez_compressed(out / "logits.npz", positions=positions, before=before, after=after)


def _batch(batches: dict[str, np.ndarray], index: int) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value[index].astype(np.int64)) for key, value in batches.items()}


def _logits(model: Any, batches: dict[str, np.ndarray], positions: np.ndarray) -> np.ndarray:
    """fp32 [positions, V] of row 0 of the held-out batch."""
    batch = {key: value[:1] for key, value in _batch(batches, -1).items() if key != "labels"}
    with torch.no_grad():
        return model(**batch).logits[0, positions].numpy()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    with np.load(sys.argv[2]) as file:
        write(Path(sys.argv[3]), load(Path(sys.argv[1])), dict(file), Settings())
