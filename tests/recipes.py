"""What the recipes of examples/ are for: models, tiny and at their real sizes, and devices."""

from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "flan-t5-xxl": {
        "model_type": "t5",
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "roberta-large-sst2": {
        "model_type": "roberta",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "architectures": ["RobertaForMaskedLM"],
    },
    "gpt2-medium-e2e": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 1024,
    },
}
SIZES = {  # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads
    "guanaco-7b": (4096, 11008, 32, 32),
    "guanaco-13b": (5120, 13824, 40, 40),
    "guanaco-33b": (6656, 17920, 60, 52),
    "guanaco-65b": (8192, 22016, 80, 64),
    "llama-3.1-8b-tpu-v5e-8": (4096, 14336, 32, 32),
}
REAL: dict[str, dict[str, Any]] = {
    "llama-3.1-8b-tpu-v5e-8": {"num_key_value_heads": 8, "vocab_size": 128256},
    "flan-t5-xxl": {
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "vocab_size": 32128,
    },
    "roberta-large-sst2": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "vocab_size": 50265,
    },
    "gpt2-medium-e2e": {"n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 50257},
}
DEVICES = {
    "guanaco-7b": "4090",
    "guanaco-13b": "4090",
    "guanaco-33b": "a6000",
    "guanaco-65b": "a6000",
    "llama-3.1-8b-tpu-v5e-8": "v5e:2x4",
    "flan-t5-xxl": "4090",
    "roberta-large-sst2": "t4",
    "gpt2-medium-e2e": "t4",
}
"""What each recipe says that it is for."""


def real(name: str) -> dict[str, Any]:
    """The config.json of a recipe's model."""
    about = CONFIGS.get(name, LLAMA) | {"vocab_size": 32000}
    if name in SIZES:
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        about |= dict(zip(fields, SIZES[name], strict=True))
        about |= {"num_key_value_heads": SIZES[name][-1], "tie_word_embeddings": False}
    return about | REAL.get(name, {})
