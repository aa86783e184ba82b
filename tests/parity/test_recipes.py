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
from tests.recipes import CONFIGS, DEVICES, EXAMPLES, LLAMA, real

pytestmark = pytest.mark.standard_promotion
WORDS = ("alpha", "beta", "gamma", "delta", "omega", "sigma")
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
    (tmp_path / "config.json").write_text(json.dumps(real(name)))
    recipe = str(EXAMPLES / f"{name}.yaml")
    options = ["--recipe", recipe, "--device", DEVICES[name], "--estimate", "--trials", "0"]
    cli.main(["plan", str(tmp_path), *options, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["fits"] and result["total"] <= result["device"]["room"]
