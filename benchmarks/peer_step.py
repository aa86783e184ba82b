"""The peer: PEFT on a bitsandbytes 4-bit model of transformers."""

from pathlib import Path
from typing import Any


def save_dense(gguf: Path, folder: Path) -> None:
    """The GGUF as a Hugging Face folder in fp32, which transformers can quantize while loading."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # A model that came from a GGUF refuses to be saved; the same weights in a new one do not.
    config = type(loaded.config)(**loaded.config.to_diff_dict())
    config.__dict__.pop("quantization_config", None)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)


def prepare(folder: Path, batch: int, time: int, rank: int) -> Any:
    """A function that takes one train step on random tokens, all of them labelled."""
    import torch

    model, step = prepare_steps(folder, rank)
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, time))
    return lambda: step({"input_ids": ids, "labels": ids})


def prepare_steps(folder: Path, rank: int) -> tuple[Any, Any]:
    """(model, step): step(batch of tensors) takes one train step and returns its loss.

    NF4, double quantization, fp32. The model is in train mode from the start: after a first forward
    pass in eval mode bitsandbytes' CPU build drops gradients.
    """
    import peft
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    adapter = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model: Any = peft.get_peft_model(base, adapter)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)

    def step(batch: dict[str, Any]) -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return base, step
