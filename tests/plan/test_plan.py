"""Plans with a compiler that is not there: what is asked of it, and what comes of its answers."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from qlora_jax.cli import main
from qlora_jax.commands.plan import read_about
from qlora_jax.commands.train import Train
from qlora_jax.errors import QloraError
from qlora_jax.lora import LoraConfig
from qlora_jax.models.attention import use_attention
from qlora_jax.plan import abstract, chart, planner, report, worker
from qlora_jax.plan.compiling import Compiled
from qlora_jax.plan.devices import find
from qlora_jax.plan.planner import Planner
from qlora_jax.plan.workload import Workload
from qlora_jax.quant.implementations import use_implementation
from qlora_jax.training.settings import TrainSettings

pytestmark = pytest.mark.standard_promotion  # optax

ABOUT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
WORKLOAD = Workload(ABOUT, 32, LoraConfig(rank=4), TrainSettings(batch_size=2, remat="none"))


FOUND = {}


def by_formula(workload, device, implementation=None):
    """As the planner's, each answer once: they take most of the time here."""
    key = workload.to_json(), device.name, implementation
    if key not in FOUND:
        FOUND[key] = planner.by_formula(workload, device, implementation)
    return FOUND[key]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ABOUT))
    return tmp_path


class Compiler:
    """Answers with the formula's bytes, a tenth of the temporaries on top. refuses: batches that it
    says there is no room for, without a number."""

    def __init__(self, device, refuses=10**9):
        self.device, self.refuses, self.asked = device, refuses, []

    def __call__(self, workload, device=None):
        self.asked.append((workload, device))
        found = by_formula(workload, device or self.device, "xla")
        if workload.batch >= self.refuses:
            return Compiled(None, 1.0, "xla", "xla", "RESOURCE_EXHAUSTED: no room")
        return Compiled(found.measured(found.temporaries * 11 // 10), 1.0, "xla", "xla")


def shrunk(device, room):
    """The device with so little room."""
    return dataclasses.replace(device, memory=room + device.keeps)


def total(**changes):
    return by_formula(WORKLOAD.with_training(**changes), find("a6000"), "xla").total


def test_workloads_go_through_json():
    full = dataclasses.replace(
        WORKLOAD,
        lora=LoraConfig(rank=8, targets=("q_proj",), rank_pattern={"q_proj": 2}),
        quantization=None,
    )
    for workload in (WORKLOAD, full):
        assert Workload.from_json(workload.to_json()) == workload


def test_what_fits_is_said_with_the_largest(capsys):
    device = find("a6000")
    compiler = Compiler(device)
    plan = Planner(WORKLOAD, device, compiler).plan(trials=1)
    assert plan.fits and not plan.suggestions
    assert plan.sequence.fits == 256 and plan.sequence.exact  # the model's context
    assert plan.batch.fits == 4096
    assert plan.compiles == len(compiler.asked) == 3
    chart.show(plan)
    text = capsys.readouterr().out
    assert "fits:" in text and "256 tokens (more there cannot be)" in text
    for part in ("4-bit codes", "gradients", "optimizer state", "activations"):
        assert part in text
    numbers = report.to_json(plan)
    assert numbers["total"] == sum(
        size for name, size in numbers["footprint"].items() if not name.endswith("_host")
    )
    assert json.loads(json.dumps(numbers))["method"] == "compiled"


@pytest.mark.slow
def test_what_does_not_fit_gets_what_does(capsys):
    """Room for remat but not without; every suggestion is one that was compiled."""
    room = (total() + total(remat="full")) // 2
    device = shrunk(find("a6000"), room)
    compiler = Compiler(device)
    plan = Planner(WORKLOAD, device, compiler).plan(trials=4)
    assert not plan.fits
    remat, *rest = plan.suggestions
    assert remat.options.startswith("--training.remat") and remat.total <= room
    assert plan.batch.fits == 1 and plan.batch.exact
    assert [s.options for s in rest if "accumulate" in s.options] == [
        "--training.batch-size 1 --training.accumulate 2"
    ]
    assert rest[-1].options == "NVIDIA T4"  # the smallest that has room
    compiled = [(w.training.remat, w.batch, d and d.name) for w, d in compiler.asked]
    assert ("none", 2, "t4") in compiled
    chart.show(plan)
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.slow
def test_a_compiler_that_refuses(capsys):
    device = find("a6000")
    plan = Planner(WORKLOAD, device, Compiler(device, refuses=2)).plan(trials=2)
    assert not plan.fits
    assert (plan.batch.fits, plan.batch.fails) == (1, 2)
    chart.show(plan)
    assert "does not fit: RESOURCE_EXHAUSTED: no room" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_estimates(folder, capsys, tmp_path):
    image = tmp_path / "plan.png"
    main(
        ["plan", str(folder), "--device", "a6000", "--estimate", "--sequence", "64"]
        + ["--rank", "4", "--plot", str(image)]
    )
    text = capsys.readouterr().out
    assert "ESTIMATE by formula" in text and "batch 1 x 64 tokens" in text
    assert image.read_bytes().startswith(b"\x89PNG")
    main(["plan", str(folder / "config.json"), "--device", "4090", "--estimate", "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["fits"] and numbers["method"] == "formula" and numbers["rank"] == 64


def test_a_recipe(folder, capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {folder}\ndata: rows.jsonl\noutput: out\nmax_length: 128\n"
        "lora: {rank: 8, targets: [q_proj, v_proj]}\n"
        "training: {batch_size: 3, accumulate: 2, remat: full}\n"
    )
    command = ["plan", "--recipe", str(recipe), "--device", "a6000", "--estimate", "--json"]
    main([*command, "--trials", "0"])
    numbers = json.loads(capsys.readouterr().out)
    wanted = {"batch": 3, "accumulate": 2, "sequence": 128, "rank": 8, "remat": "full"}
    assert {name: numbers[name] for name in wanted} == wanted
    main([*command, "--trials", "0", "--batch", "1", "--sequence", "32"])
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["batch"], numbers["sequence"]) == (1, 32)
    # Of rows with a source and a target both make up a row, as far as the context goes.
    for lengths, sequence in (((100, 28), 128), ((200, 100), 256)):
        text = recipe.read_text().split("dataset_format")[0]
        source, target = lengths
        recipe.write_text(
            f"{text}dataset_format: alpaca\nsource_max_length: {source}\n"
            f"target_max_length: {target}\n"
        )
        main([*command, "--trials", "0"])
        assert json.loads(capsys.readouterr().out)["sequence"] == sequence


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--device", "abacus"], "no device 'abacus' is known.*a6000.*v5e"),
        (["--device", "a6000", "--sequence", "512"], "longer than the model's context of 256"),
        (["--device", "a6000", "--batch", "0"], "batch_size must be at least 1"),
        (["--device", "a6000", "--trials", "-1"], "must not be negative"),
        (["--device", "v5e", "--compilers", "nowhere"], "TPU compiler is not installed in nowhere"),
        (["--device", "h100", "--compilers", "nowhere"], r"pip install .*jax-cuda13-plugin=="),
    ],
)
def test_mistakes(folder, options, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(folder), *options])
    assert stopped.value.code == 2
    assert re.search(says, capsys.readouterr().err, re.DOTALL)


def test_unknown_models(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path), "--device", "a6000"])
    assert "mamba" in capsys.readouterr().err
    with pytest.raises(QloraError, match="no such file or folder"):
        read_about("nobody-s-folder")
    with pytest.raises(SystemExit):
        main(["plan", "--device", "a6000"])
    assert "which MODEL" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "attention"), [("a6000", "cudnn"), ("t4", "xla")])
def test_a_gpus_step_has_the_attention_that_the_gpu_would_choose(device, attention):
    """Lowered for it, on a machine that has neither cuDNN nor XLA's compiler for GPUs."""
    device = find(device)
    step = abstract.of_workload(WORKLOAD).placed(worker.placement(WORKLOAD, device))
    chosen = step.attention(device.attention)
    with use_attention(chosen), use_implementation("xla"):
        text = worker.lower(step.step, step.arguments, device).as_text()
    assert chosen == attention
    assert ("__cudnn$fmha" in text) == (attention == "cudnn")


@pytest.mark.slow
def test_smaller_micro_batches_are_the_same_step():
    """32 rows fit, but two halves of 60 cannot be split over four devices: three parts can."""
    device = find("v5e:2x2")

    def plan(batch, device):
        workload = WORKLOAD.with_training(batch_size=batch, accumulate=3)
        return Planner(workload, device, None).plan(trials=1)

    room = report.to_json(plan(32, device))["total"]
    found = plan(60, shrunk(device, room))
    assert not found.fits and found.batch.fits == 32
    assert [s.options for s in found.suggestions if "accumulate" in s.options] == [
        "--training.batch-size 20 --training.accumulate 9"
    ]


@pytest.mark.slow
def test_a_roberta_has_fewer_positions_than_its_table(tmp_path, capsys):
    about = {"model_type": "roberta", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    about |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 130}
    (tmp_path / "config.json").write_text(json.dumps(about))
    options = ["--device", "h100", "--estimate", "--json", "--sequence", "64", "--rank", "4"]
    main(["plan", str(tmp_path), *options])
    found = json.loads(capsys.readouterr().out)
    assert found["largest_sequence"]["fits"] == 128
    # Adapters on 2 x 6 weights, and the head in full, as `train` has it.
    adapters = 2 * 4 * (4 * (64 + 64) + 2 * (64 + 128))
    assert found["trained_parameters"] == adapters + 64 * 65 + 2 * 65


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_the_settings_are_those_that_memory_auto_chooses(remat):
    auto = WORKLOAD.with_training(memory="auto", remat="dots", batch_size=8)
    room = int(total(remat=remat, batch_size=8) / 0.95) + 2
    chosen = planner.with_memory_chosen(auto, shrunk(find("a6000"), room))
    assert (chosen.training.remat, chosen.training.batch_size) == (remat, 8)


@pytest.mark.slow
def test_shorter_sequences_are_said_as_the_recipe_cuts_them(folder, capsys):
    recipe = folder / "recipe.yaml"
    text = f"model: {folder}\noutput: out\ndata: [rows.jsonl]\ndataset_format: alpaca\n"
    text += "target_max_length: 100\ntraining: {batch_size: 10000, sequence_length: 256}\n"
    recipe.write_text(text)
    command = ["plan", "--recipe", str(recipe), "--device", "t4", "--estimate", "--json"]
    main(command)
    found = json.loads(capsys.readouterr().out)
    options = {x["what"]: x["options"] for x in found["suggestions"]}["shorter sequences"]
    fits = found["largest_sequence"]["fits"]
    target = min(100, fits // 2)
    assert options == (
        f"--source-max-length {fits - target} --target-max-length {target}"
        f" --training.sequence-length {fits}"
    )


def test_lengths_are_cut_to_a_row():
    def cut(tokens, encoder_decoder=False, **lengths):
        train = Train(data=("x.jsonl",), model="", output=Path(), **lengths)
        return train.cut_to(tokens, encoder_decoder)

    assert cut(512) == "--max-length 512"
    assert cut(512, max_length=256) == "--max-length 256"
    guanaco = {"dataset_format": "oasst1", "source_max_length": 16, "target_max_length": 512}
    assert cut(512, **guanaco) == "--source-max-length 16 --target-max-length 496"
    long = {"dataset_format": "alpaca", "source_max_length": 900, "target_max_length": 300}
    assert cut(512, **long) == "--source-max-length 256 --target-max-length 256"
    assert cut(512, True, **long) == "--source-max-length 512 --target-max-length 300"


@pytest.mark.parametrize("trials", ["0", "2"])
def test_a_mesh_that_the_device_cannot_have_is_refused(folder, trials, capsys):
    command = ["plan", str(folder), "--device", "b200", "--mesh", "fsdp=8", "--trials", trials]
    command += ["--batch", "8"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--estimate"])
    assert "fsdp=8: 8 does not divide 1" in capsys.readouterr().err
