"""The command line: the whole way on a tiny model, and what bad input gets."""

import ast
import importlib
import inspect
import json
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qlora_jax import cli, demo_task, generation
from qlora_jax.commands import chat, generate
from qlora_jax.commands.options import program
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


# Of a run whose adapter does not matter: most of its time would go into compiling the others.
ONE_MODULE = ("--lora.targets", "q_proj", "--training.steps", 1)


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
        "training: {steps: 5, batch_size: 2, remat: full, packing: true}\n"
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
        "generate", "--model", small, "--adapter", adapter, "--prompts", prompts,
        "--output", answers, "--sampling.max-new-tokens", 5,
    )  # fmt: skip
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["prompt"] for row in found] == ["say a", "say b"]

    typed = iter(["hi", "/new", "ho", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    run("chat", "--model", small, "--adapter", adapter, "--sampling.max-new-tokens", 3)
    assert next(typed, None) is None


@pytest.mark.slow
def test_initial_values_taken_out_of_the_base(folder, rows, tmp_path, capsys):
    """The base that is left is written, and named as the adapter's; without 4 bits too."""
    for bits, init in (("nf4", "loftq"), ("none", "pissa_niter_2")):
        output = tmp_path / bits
        given = ("--model", folder, "--quantization", bits, "--data", rows, "--output", output)
        lora = ("--lora.init", init, "--lora.targets", "q_proj", "--training.steps", 1)
        run("train", *given, *lora, "--training.loraplus-lr-ratio", 4)
        text = capsys.readouterr().out
        assert f"belongs to the base in {output / 'base'}, not to" in text
        # A base in 4 bits says itself how, a dense one would be quantized again.
        words = " --quantization none" if bits == "none" else ""
        assert f"chat --model {output / 'base'}{words} --adapter {output}" in text
        about = json.loads((output / "adapter_config.json").read_text())
        assert about["base_model_name_or_path"] == str(output / "base")
        on = ("--model", output / "base", "--adapter", output, "--prompt", "say a")
        bits = "auto" if bits == "nf4" else bits
        run("generate", *on, "--quantization", bits, "--sampling.max-new-tokens", 2)
        capsys.readouterr()
    # An attempt that came to no checkpoint leaves a base that the next one makes anew.
    (output / "base" / "stale").touch()
    run("train", *given, *lora, "--training.loraplus-lr-ratio", 4, "--resume")
    assert (output / "base" / "stale").exists()
    for path in output.glob("step-*"):
        shutil.rmtree(path)
    (output / "adapter_model.safetensors").unlink()
    run("train", *given, *lora, "--lora.rank", 2, "--resume")
    assert not (output / "base" / "stale").exists()


@pytest.mark.slow
def test_a_run_that_a_scheduler_stops_is_resumed(folder, rows, tmp_path, capsys, monkeypatch):
    """SIGTERM ends it as if it were done: exit 0. What is left is done later, and then no more."""
    from qlora_jax.training.stream import StepBatches

    output, real = tmp_path / "out", StepBatches.start
    words = ("train", "--model", folder, "--data", rows, "--output", output, "--resume")
    words = (*words, "--lora.targets", "q_proj", "--training.steps", 3)

    def stopped(self: StepBatches, step: int = 0) -> Iterator[Any]:
        signal.raise_signal(signal.SIGTERM)
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(StepBatches, "start", stopped)
        run(*words)
    shown = capsys.readouterr().out
    assert "no checkpoint to go on from" in shown
    assert "interrupted after step 1 (SIGTERM)" in shown and "try it" not in shown
    text = refused(capsys, *words, "--training.seed", 1)
    assert "training.seed: 0 -> 1" in text
    text = refused(capsys, *[word for word in words if word != "--resume"])
    assert "go on with its run" in text
    run(*words)
    shown = capsys.readouterr().out
    assert "going on after step 1 of 3" in shown and "try it" in shown
    run(*words)
    assert "the run is finished" in capsys.readouterr().out


def test_merging_into_the_original_weights(folder, rows, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    run("train", "--model", folder, "--data", rows, "--output", adapter, *ONE_MODULE)
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


@pytest.mark.slow
def test_a_folder_in_four_bits_keeps_its_format(folder, rows, tmp_path, capsys):
    """Whatever was asked for and cannot be had is refused, never ignored."""
    small, adapter = tmp_path / "small", tmp_path / "adapter"
    run("quantize", "--model", folder, "--output", small, "--block-size", 32)
    run("train", "--model", small, "--data", rows, "--output", adapter, *ONE_MODULE)
    prompt = ("--model", small, "--prompt", "x", "--sampling.max-new-tokens", 1)
    run("generate", *prompt, "--block-size", 32, "--quantization", "nf4")
    capsys.readouterr()
    for asked in (
        ("--block-size", 64),
        ("--no-double-quant",),
        ("--quantization", "fp4"),
        ("--quantization", "fp4", "--block-size", 32),
    ):
        text = refused(capsys, "generate", *prompt, *asked)
        assert "already quantized as QuantConfig(codebook='nf4', block_size=32" in text
    text = refused(capsys, "generate", *prompt, "--quantization", "none")
    assert "its weights are in 4 bits, so --quantization none cannot be" in text
    merge = ("--model", small, "--adapter", adapter, "--output", tmp_path / "m")
    text = refused(capsys, "merge", *merge, "--into", "original")
    assert "the original weights are not in this checkpoint" in text
    run("convert", folder, tmp_path / "bnb", "--to", "bitsandbytes")
    merge = ("--model", tmp_path / "bnb", "--adapter", adapter, "--output", tmp_path / "m")
    text = refused(capsys, "merge", *merge, "--into", "original")
    assert "the original weights are not in this checkpoint" in text
    assert not (tmp_path / "m").exists()


def test_merging_what_is_trained_in_full_alone(folder, rows, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    dense = ("--model", folder, "--quantization", "none")
    settings = tmp_path / "settings.yaml"
    settings.write_text("lora: {targets: [], modules_to_save: [norm]}\ntraining: {steps: 1}\n")
    run("train", "--config", settings, *dense, "--data", rows, "--output", adapter)
    run("merge", *dense, "--adapter", adapter, "--output", tmp_path / "m")
    assert "(norm/scale)" in capsys.readouterr().out
    assert (tmp_path / "m" / "model.safetensors").exists()


@pytest.mark.slow
def test_data_sets_of_the_hub_by_split(folder, rows, tmp_path, capsys, monkeypatch):
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"prompt": split, "completion": "yes"}] * 4

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    train = ("train", "--model", folder, *ONE_MODULE, "--data", "openai/gsm8k:main")
    run(*train, "--output", tmp_path / "a", "--eval-data", "openai/gsm8k:main@test")
    run(*train, "--output", tmp_path / "b", "--eval-data", "openai/gsm8k@validation[:9]")
    assert asked == [
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", None, "validation[:9]"),
    ]
    capsys.readouterr()
    out = ("--output", tmp_path / "c")
    text = refused(capsys, *train, *out, "--eval-data", "openai/gsm8k:main@train")
    assert "has the same rows as --data openai/gsm8k:main" in text
    text = refused(capsys, "train", "--model", folder, "--data", rows, "--eval-data", rows, *out)
    assert "has the same rows as --data" in text


def test_prompts_that_cannot_be_read(folder, tmp_path, capsys):
    command = ("generate", "--model", folder, "--prompts")
    assert "a folder; --prompts takes a text file" in refused(capsys, *command, tmp_path)
    assert "no such file" in refused(capsys, *command, tmp_path / "none")
    prompts = tmp_path / "latin.txt"
    prompts.write_bytes("été\n".encode("latin-1"))
    assert "latin.txt: not UTF-8 text" in refused(capsys, *command, prompts)
    prompts.write_text("\n \n")
    assert "no prompts; expected one to a line" in refused(capsys, *command, prompts)
    prompts.write_text("a")
    output = (*command, prompts, "--output")
    assert "there is no folder" in refused(capsys, *output, tmp_path / "none" / "out.jsonl")
    assert "a folder; --output takes a file" in refused(capsys, *output, tmp_path)
    prompts.write_text("\ufeffone\u2028half\ntwo\n", "utf-8")
    assert generate._read_lines(prompts) == ["one\u2028half", "two"]


@pytest.mark.parametrize("command", ["train", "generate", "chat", "demo"])
def test_a_model_without_a_tokenizer(command, folder, rows, tmp_path, capsys):
    mute = Path(shutil.copytree(folder, tmp_path / "mute"))
    for path in mute.glob("tokenizer*"):
        path.unlink()
    more = {
        "train": ("--data", rows, "--output", tmp_path / "out"),
        "generate": ("--prompt", "x"),
        "chat": (),
        "demo": ("--output", tmp_path / "out"),
    }[command]
    assert "mute has no tokenizer" in refused(capsys, command, "--model", mute, *more)


def test_a_turn_of_a_chat_may_fail(folder, capsys, monkeypatch):
    """A conversation beyond the context, and Ctrl-C during an answer: the chat goes on."""
    typed = iter(["x" * 600, "stop", "hello", ""])
    given: list[str] = []

    def interrupted(model: Any, ids: Any, sampling: Any, *, params: Any) -> Iterator[str]:
        given.append(model.tokenizer.decode(ids))
        yield from generation.stream(model, ids, sampling, params=params)
        if len(given) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(chat, "stream", interrupted)
    run("chat", "--model", folder, "--sampling.max-new-tokens", 3)
    text = capsys.readouterr().out
    assert next(typed, None) is None
    assert "more than the model's context of 512" in text
    assert "your last line is taken back; /new starts over" in text
    assert "(stopped)" in text
    # The line that was too long is gone, the one whose answer was stopped is not.
    assert "xxx" not in given[2] and "stop" in given[2] and "hello" in given[2]


def test_the_program_is_named_as_it_was_called(tmp_path, monkeypatch):
    script = tmp_path / "venv" / "bin" / "qlora-jax"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", [str(script), "demo"])
    assert program() == str(script)
    monkeypatch.chdir(tmp_path)
    assert program() == "venv/bin/qlora-jax"
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "qlora-jax"
    monkeypatch.setattr(sys, "argv", ["/elsewhere/qlora_jax/cli.py"])
    assert program() == "qlora-jax"


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
    # What has its place on the command line is in capitals.
    assert not [name for name in options if name not in text and name[2:].upper() not in text]


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


def test_paths_in_the_home_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text("output: ~/small\n")
    shutil.copytree(folder, tmp_path / "model")
    run("quantize", "--model", "~/model", "--config=~/s.yaml")
    assert (tmp_path / "small").is_dir() and not (tmp_path / "~").exists()
    capsys.readouterr()
    text = refused(capsys, "merge", "--model", "~/model", "--adapter=~/none", "--output=~/m")
    assert f"{tmp_path / 'none'}" in text


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
