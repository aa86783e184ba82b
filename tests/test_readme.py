"""The README's example is run as printed, but for the model: a tiny random one stands in."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests import tiny

README = Path(__file__).resolve().parents[1] / "README.md"
MODEL = '"HuggingFaceTB/SmolLM2-135M-Instruct"'


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.standard_promotion
def test_example(tmp_path, monkeypatch, capsys):
    (example,) = blocks("python")
    assert example.count("\n") <= 24, "the example is to stay at some twenty lines"
    assert MODEL in example
    folder = tiny.write_checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(example.replace(MODEL, repr(str(folder))), str(README), "exec"), scope)
    assert "bits per weight" in capsys.readouterr().out
    assert np.isfinite(float(scope["metrics"]["loss"]))
    assert int(scope["state"].step) == 20
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_commands_are_targets_of_the_makefile():
    makefile = (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z]+)", README.read_text()))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_it_names_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
