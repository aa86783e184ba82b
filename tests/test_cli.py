"""The command line: the whole way on a tiny model, and what bad input gets."""

import ast
import importlib
import inspect
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest

from qlora_jax import cli, demo_task
from qlora_jax.commands.train import Train
from qlora_jax.generation import Sampling
from qlora_jax.lora import LoraConfig
from qlora_jax.training.settings import TrainSettings
from tests import tiny

pytestmark = pytest.mark.standard_promotion
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"say {w}", "completion": w * 3}) for w in "abcdefgh"]
    path.write_text("\n".join(lines))
    return path


def run(*words: object) -> None:
    cli.main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    text = shown.err + shown.out
    assert "Traceback" not in text
    return text


def test_from_training_to_a_merged_checkpoint(folder, rows, tmp_path, capsys, monkeypatch):
    adapter, merged, small = (tmp_path / name for name in ("adapter", "merged", "small"))
    run("quantize", "--model", folder, "--output", small)
    assert "bits each" in capsys.readouterr().out
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"model: {small}\ndata: {rows}\nmax_length: 64\neval_count: 2\n"
        "lora: {rank: 4, targets: [q_proj, v_proj], rank_pattern: {v_proj: 2}}\n"
        "training: {steps: 5, batch_size: 2, remat: true}\n"
    )
    run("train", "--config", settings, "--output", adapter, "--training.steps", 3)
    assert "step 3/3" in capsys.readouterr().out
    about = json.loads((adapter / "adapter_config.json").read_text())
    assert (about["r"], sorted(about["target_modules"])) in [
        (4, ["q_proj", "v_proj"]),
        (2, ["q_proj", "v_proj"]),
    ]

    run("merge", "--model", small, "--adapter", adapter, "--output", merged)
    assert "weights differ from what was trained by" in capsys.readouterr().out
    prompt = ("--prompt", "say a", "--sampling.max-new-tokens", 5)
    run("generate", "--model", merged, "--quantization", "none", *prompt)
    capsys.readouterr()

    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("say a\n\nsay b\n")
    run(
        "generate",
        "--model",
        small,
        "--adapter",
        adapter,
        "--prompts",
        prompts,
        "--output",
        answers,
    )
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["prompt"] for row in found] == ["say a", "say b"]

    typed = iter(["hi", "/new", "ho", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    run("chat", "--model", small, "--adapter", adapter, "--sampling.max-new-tokens", 3)
    assert next(typed, None) is None


def test_merging_into_the_original_weights(folder, rows, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    run("train", "--model", folder, "--data", rows, "--output", adapter, "--training.steps", 1)
    run(
        "merge",
        "--model",
        folder,
        "--adapter",
        adapter,
        "--output",
        tmp_path / "m",
        "--into",
        "original",
    )
    assert "at most" in capsys.readouterr().out


def test_the_demo(folder, tmp_path, capsys):
    run(
        "demo", "--model", folder, "--output", tmp_path / "out", "--training.steps", 2,
        "--training.batch-size", 2, "--test-examples", 2,
    )  # fmt: skip
    text = capsys.readouterr().out
    assert "exact match on 2 held-out notes: 0% -> 0%" in text
    assert (tmp_path / "out" / "loss.png").exists()


def fields_of(settings: type, prefix: str = "") -> dict[str, bool]:
    """Option -> whether a docstring below its field explains it."""
    found = {}
    for kind in settings.__mro__[-2::-1]:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
        for field, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                found[f"--{prefix}{ast.unparse(field.target).replace('_', '-')}"] = explained
    return found


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_complete(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--config" in text
    module = importlib.import_module(f"qlora_jax.commands.{command}")
    settings = getattr(module, cli.COMMANDS[command][0])
    options = fields_of(settings)
    groups = {"--lora": LoraConfig, "--training": TrainSettings, "--sampling": Sampling}
    for group in options.keys() & groups.keys():
        options |= fields_of(groups[group], f"{group[2:]}.")
        del options[group]
    assert all(options.values()), [name for name, explained in options.items() if not explained]
    assert not [name for name in options if name not in text]


def test_bad_input_is_one_message(folder, rows, tmp_path, capsys):
    out = ("--output", tmp_path / "out")
    model = ("--model", folder)
    assert "no command 'dance'" in refused(capsys, "dance")
    assert "--model" in refused(capsys, "train")
    text = refused(capsys, "train", *model, "--data", tmp_path / "none.jsonl", *out)
    assert "no such file" in text
    text = refused(capsys, "train", "--model", tmp_path / "none", "--data", rows, *out)
    assert "no such file or folder" in text
    text = refused(capsys, "train", *model, "--data", rows, *out, "--lora.targets", "nothing")
    assert "matches no module" in text
    text = refused(capsys, "train", *model, "--data", rows, *out, "--lora.rank", "0")
    assert "rank" in text
    text = refused(capsys, "train", *model, "--data", rows, *out, "--training.batch-size", "0")
    assert "batch_size must be at least 1" in text
    text = refused(capsys, "train", *model, "--data", rows, *out, "--eval-count", "8")
    assert "leaves none of 8 rows" in text
    assert "one of --prompt and --prompts" in refused(capsys, "generate", *model)
    text = refused(capsys, "generate", *model, "--prompt", "x", "--adapter", tmp_path)
    assert "adapter_config.json is not there" in text
    assert "nothing to write" in refused(capsys, "quantize", *model, *out, "--quantization", "none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "already there" in refused(capsys, "quantize", *model, "--output", tmp_path / "full")


def test_bad_settings_files(folder, tmp_path, capsys):
    settings = tmp_path / "s.yaml"
    assert "no such file" in refused(capsys, "train", "--config", settings)
    settings.write_text("a: [")
    assert "not YAML" in refused(capsys, "train", "--config", settings)
    settings.write_text("- a\n")
    assert "expected settings as" in refused(capsys, "train", "--config", settings)
    settings.write_text(f"model: {folder}\nlora: {{ranks: 3}}\n")
    assert "--lora.ranks" in refused(capsys, "train", "--config", settings)
    assert "--config needs a file" in refused(capsys, "train", "--config")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_settings_are_settings(path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(Train, "run", lambda self: ran.append(self))
    run("train", "--config", path)
    assert ran[0].output.name == path.stem


def test_usage(capsys):
    run()
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)


def test_the_demos_task():
    """Two runs agree; the test split shares no sentence, name, item or city with training."""
    train, test = (demo_task.make_examples(split, 300) for split in ("train", "test"))
    assert (
        train == demo_task.make_examples("train", 300) != demo_task.make_examples("train", 300, 1)
    )
    assert len({row["prompt"] for row in train}) == 300
    for field in ("first_names", "family_names", "items", "cities"):
        assert not set(getattr(demo_task.TRAIN, field)) & set(getattr(demo_task.TEST, field))
    sentences = [{t for _, t in words.templates} for words in (demo_task.TRAIN, demo_task.TEST)]
    assert not sentences[0] & sentences[1]
    for row in test:
        record = json.loads(row["completion"])
        assert record["city"] in row["prompt"] and record["customer"] in row["prompt"]
        assert f"{record['cents'] / 100:.2f}" in row["prompt"]
        assert 1 <= int(record["date"].partition("/")[2]) <= 12
    answers = [row["completion"] for row in test]
    assert demo_task.exact_match(answers, answers) == 1
    half = [a if i % 2 else a + "x" for i, a in enumerate(answers)]
    assert demo_task.exact_match(half, answers) == np.mean([i % 2 for i in range(300)])
