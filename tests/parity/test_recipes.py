"""Every recipe of examples/ run for two steps, with a tiny model of its family and rows like its
data set's: the same settings, the same code."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

import qlora_jax as qj
from qlora_jax import cli
from qlora_jax.checkpoints.export import save_pretrained
from qlora_jax.checkpoints.seq2seq import Seq2SeqModel
from qlora_jax.checkpoints.tokenizer import from_folder
from qlora_jax.models import init_params, read_config
from tests import tiny

pytestmark = pytest.mark.standard_promotion
EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ("alpha", "beta", "gamma", "delta", "omega", "sigma")
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
ROWS = {
    "oasst1": lambda word: {"text": f"### Human: {word}### Assistant: {word[::-1]}"},
    "alpaca": lambda word: {"instruction": word, "input": "", "output": word[::-1]},
    "classification": lambda word: {"sentence": word, "label": len(word) % 2},
    "input-output": lambda word: {"input": word, "output": word[::-1]},
    "auto": lambda word: {"prompt": word, "completion": word[::-1]},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return from_folder(tiny.write_checkpoint(tmp_path_factory.mktemp("tiny")))


def write_model(folder: Path, tokenizer: Any, hf: dict[str, Any]) -> Path:
    config = read_config(hf | {"vocab_size": len(tokenizer)})
    kinds = {"t5": Seq2SeqModel, "roberta": qj.EncoderModel}
    params = init_params(config, jax.random.key(0))
    model = kinds.get(config.model_type, qj.Model)(config, params, tokenizer, "tiny", np.float32)
    save_pretrained(folder, model, dtype=np.float32)
    return folder


@pytest.mark.parametrize("recipe", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe(recipe, tokenizer, tmp_path):
    settings = yaml.safe_load(recipe.read_text())
    model = write_model(tmp_path / "model", tokenizer, CONFIGS.get(recipe.stem, LLAMA))
    row = ROWS[settings.get("dataset_format", "auto")]
    sources = []
    for name, words in (("train", WORDS), ("eval", [word.upper() for word in WORDS])):
        sources.append(tmp_path / f"{name}.jsonl")
        sources[-1].write_text("\n".join(json.dumps(row(word)) for word in words))
    out = tmp_path / "out"
    changed = {"model": model, "data": sources[0], "output": out, "training.steps": 2}
    changed |= {"training.epochs": None}
    if settings["training"].get("warmup", 0) > 2:
        changed["training.warmup"] = 1
    if "eval_data" in settings:
        changed["eval-data"] = sources[1]
    if "eval_count" in settings:
        changed["eval-count"] = 1
    options = [text for name, value in changed.items() for text in (f"--{name}", str(value))]
    cli.main(["train", "--config", str(recipe), *options])
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert all(np.isfinite(entry.get("loss", entry.get("eval_loss"))) for entry in history)
    assert (out / qj.peft.WEIGHTS).exists()


@pytest.mark.parametrize("name", DEVICES)
def test_a_recipe_fits_its_device(name, tmp_path, capsys):
    """At its real size, by the formula of `plan`."""
    hf = CONFIGS.get(name, LLAMA) | {"vocab_size": 32000}
    if name in SIZES:
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        hf |= dict(zip(fields, SIZES[name], strict=True))
        hf |= {"num_key_value_heads": SIZES[name][-1], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(hf | REAL.get(name, {})))
    recipe = str(EXAMPLES / f"{name}.yaml")
    options = ["--recipe", recipe, "--device", DEVICES[name], "--estimate", "--trials", "0"]
    cli.main(["plan", str(tmp_path), *options, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["fits"] and result["total"] <= result["device"]["room"]
