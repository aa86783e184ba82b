"""Examples in docs/ are run as printed, but for the model: a tiny random one stands in."""

import re
from pathlib import Path
from typing import get_args

import jax
import pytest

from qlora_jax import cli
from qlora_jax.commands.data_options import DatasetFormat
from qlora_jax.commands.train import Train
from tests import tiny
from tests.test_readme import MODEL, blocks

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.standard_promotion
def test_decomposed_adapters(tmp_path):
    (example,) = blocks("python", DOCS / "adapters.md")
    assert MODEL in example
    folder = tiny.write_checkpoint(tmp_path / "model", layers=1)
    scope: dict = {}
    exec(compile(example.replace(MODEL, repr(str(folder))), "adapters.md", "exec"), scope)
    qj, model, adapters = (scope[name] for name in ("qj", "model", "adapters"))
    merged = qj.lora.merge(model.params, adapters)
    for path, leaf in qj.lora.adapters.named_leaves(scope["dense"].params).items():
        if path in adapters:
            found = qj.lora.adapters.named_leaves(merged)[path]
            assert jax.numpy.linalg.norm(found - leaf) < 0.1 * jax.numpy.linalg.norm(leaf)


@pytest.mark.standard_promotion
def test_a_model_of_ones_own():
    (example,) = blocks("python", DOCS / "own_models.md")
    scope: dict = {}
    exec(compile(example, "own_models.md", "exec"), scope)
    query = scope["frozen"]["attention"]["query"]["kernel"]
    assert query.k_shape == (128,) and query.n_shape == (4, 32)
    assert scope["frozen"]["head"]["kernel"].shape == (128, 2)
    assert float(scope["metrics"]["loss"]) < 0.2


@pytest.mark.standard_promotion
def test_data(tmp_path, monkeypatch, capsys):
    examples = blocks("python", DOCS / "data.md")
    folder = tiny.write_checkpoint(tmp_path / "model", layers=1)
    scope: dict = {}
    for example in examples:
        exec(compile(example.replace(MODEL, repr(str(folder))), "data.md", "exec"), scope)
    assert scope["dataset"].parts == ((40, 0.7), (60, 0.3))
    batches = scope["batches"]
    assert batches.steps > 4 and scope["step"] == batches.steps - 1
    assert "3 {'input_ids': (4, 256), " in capsys.readouterr().out

    ran = []
    monkeypatch.setattr(Train, "run", lambda self: ran.append(self))
    (settings,) = blocks("yaml", DOCS / "data.md")
    (tmp_path / "s.yaml").write_text(settings)
    cli.main(["train", "--config", str(tmp_path / "s.yaml")])
    command = re.search(r"`--data (.*?)`", (DOCS / "data.md").read_text(), re.DOTALL)
    assert command is not None and ran[0].data == tuple(command[1].split())
    assert ran[0].training.packing and ran[0].eval_count == 500


def test_the_formats_are_all_described():
    text = (DOCS / "data.md").read_text()
    named = {
        name for row in re.findall(r"^\| ([a-z0-9, -]+) \|", text, re.M) for name in row.split(", ")
    }
    assert named - {"format"} == set(get_args(DatasetFormat))


@pytest.mark.standard_promotion
def test_interruptions(tmp_path, monkeypatch, capsys):
    (example,) = blocks("python", DOCS / "interruptions.md")
    assert MODEL in example
    folder = tiny.write_checkpoint(tmp_path / "model", layers=1)
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace(MODEL, repr(str(folder))), "interruptions.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "no checkpoint to go on from" in shown and "the run is finished" in shown
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"step-2", "step-4", "metrics.jsonl"}
