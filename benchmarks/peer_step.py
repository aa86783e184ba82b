"""The peer: PEFT on a bitsandbytes 4-bit model of transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def tokens(vocabulary: int, batch: int, time: int) -> np.ndarray:
    """The batch of every contender, int64 [B, T]: uniformly random."""
    return np.random.default_rng(0).integers(0, vocabulary, (batch, time))


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


def save_random(config: dict[str, Any], folder: Path) -> None:
    """A Hugging Face folder of random bf16 weights, as transformers initializes them."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(**config)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # it is for those that read the folder


def prepare(folder: Path, batch: int, time: int, rank: int, **how: Any) -> Any:
    """A function that takes one train step on random tokens, all of them labelled; how: as for
    `prepare_steps`."""
    model, step = prepare_steps(folder, rank, **how)
    return _on_tokens(model, step, batch, time)


def prepare_steps(
    folder: Path,
    rank: int,
    *,
    device: str = "cpu",
    dtype: Any = None,
    checkpointing: bool = False,
) -> tuple[Any, Any]:
    """(model, step): step(batch of tensors) takes one train step and returns its loss.

    NF4, double quantization; dtype: of the computation, fp32 by default. The model is in train mode
    from the start: after a first forward pass in eval mode bitsandbytes' CPU build drops gradients.
    """
    import peft
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dtype = dtype or torch.float32
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=dtype, device_map=device
    )
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
    adapter = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return base, _step(peft.get_peft_model(base, adapter), device, dtype)


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer that knows so many words beside the model: Unsloth does not load one without."""
    import tokenizers
    import transformers

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = [*special.values(), *(f"w{i}" for i in range(len(special), vocabulary))]
    numbers = {word: number for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.save_pretrained(folder)


def prepare_unsloth(
    folder: Path,
    batch: int,
    time: int,
    rank: int,
    *,
    device: str,
    dtype: Any,
    checkpointing: bool,
) -> Any:
    """As `prepare`, by Unsloth's own kernels. Its checkpointing moves activations to the host."""
    import unsloth

    save_tokenizer(folder, json.loads((folder / "config.json").read_text())["vocab_size"])
    how = "unsloth" if checkpointing else False
    base, _ = unsloth.FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=time,
        dtype=dtype,
        load_in_4bit=True,
        use_gradient_checkpointing=how,
        use_exact_model_name=True,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        base, r=rank, lora_alpha=2 * rank, lora_dropout=0.0, use_gradient_checkpointing=how
    )
    return _on_tokens(base, _step(model, device, dtype), batch, time)


def _step(model: Any, device: str, dtype: Any) -> Any:
    """AdamW on what the model trains; activations in `dtype`, as transformers' Trainer has them."""
    import torch

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    mixed = torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def step(batch: dict[str, Any]) -> float:
        with mixed:
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _on_tokens(model: Any, step: Any, batch: int, time: int) -> Any:
    import torch

    ids = torch.from_numpy(tokens(model.config.vocab_size, batch, time))
    return lambda: step({"input_ids": ids, "labels": ids})
