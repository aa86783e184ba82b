"""Runs of an encoder-decoder and of an encoder that classifies, from text to a saved adapter."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax import cli
from qlora_jax.checkpoints.export import save_pretrained
from qlora_jax.checkpoints.seq2seq import Seq2SeqModel
from qlora_jax.checkpoints.tokenizer import from_folder
from qlora_jax.data import (
    LabelledText,
    Labels,
    batches,
    evaluation_batches,
    parse_labelled,
    rows_to_examples,
    tokenize_labelled,
    tokenize_seq2seq,
)
from qlora_jax.models import init_params, read_config
from qlora_jax.training import trainer
from qlora_jax.training.settings import TrainSettings
from tests import tiny

pytestmark = pytest.mark.standard_promotion

FORMAT = ("--dataset-format", "input-output")
WORDS = ("alpha", "beta", "gamma", "delta", "omega", "sigma")
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
ROBERTA = {
    "model_type": "roberta",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
    "architectures": ["RobertaForSequenceClassification"],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return from_folder(tiny.write_checkpoint(tmp_path_factory.mktemp("tiny")))


def quantized(config):
    return qj.quantize_tree(init_params(config, jax.random.key(0)), qj.NF4())


def fit(model, config, dataset, output, **settings):
    usual = {"steps": 25, "batch_size": 3, "accumulate": 2, "learning_rate": 1e-2, "warmup": 3}
    settings = TrainSettings(**usual | settings)
    return trainer.fit(model, config, dataset, settings, output, evaluation=dataset, display=False)


def test_an_encoder_decoder_learns_pairs(tokenizer, tmp_path):
    rows = [{"prompt": f"say {word}", "completion": word[::-1]} for word in WORDS]
    dataset = tokenize_seq2seq(rows_to_examples(rows), tokenizer)
    config = read_config(T5 | {"vocab_size": len(tokenizer)})
    model = Seq2SeqModel(config, quantized(config), tokenizer, "tiny t5", np.float32)
    result = fit(model, qj.LoraConfig(rank=8), dataset, tmp_path / "out")
    losses = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert losses[-1] < 0.75 * result.history[0]["loss"]
    batch = next(batches(dataset, 4, seed=0))
    assert batch["input_ids"].shape == (4, 16) and batch["labels"].shape == (4, 16)
    adapters, _ = qj.peft.load(tmp_path / "out", model)
    for mine, theirs in zip(*map(jax.tree.leaves, (result.adapters, adapters)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", ["names", pytest.param("numbers", marks=pytest.mark.slow)])
def test_an_encoder_learns_labels(kind, tokenizer, tmp_path):
    of = {
        "names": lambda i: ("no", "maybe", "yes")[i % 3],
        "numbers": lambda i: 0.5 * i,
    }
    rows = [
        {"sentence1": word, "sentence2": word[::-1], "label": of[kind](i)}
        for i, word in enumerate(WORDS)
    ]
    examples = [parse_labelled(row, f"row {i}") for i, row in enumerate(rows)]
    labels = Labels.of(examples)
    dataset = tokenize_labelled(examples, tokenizer, 64, labels)
    config = read_config(ROBERTA | {"vocab_size": len(tokenizer)})
    config = config.with_head("classification", len(labels.names or "1"))
    model = qj.EncoderModel(config, quantized(config), tokenizer, "tiny roberta", np.float32)
    lora = qj.LoraConfig(rank=8, modules_to_save=("classifier",))
    result = fit(model, lora, dataset, tmp_path / "out")
    losses = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert losses[-1] < 0.75 * result.history[0]["loss"]
    # 6 rows in batches of 4: nothing is counted twice, as the last one is filled up with rows of no
    # class, or smaller where numbers are predicted.
    last = list(evaluation_batches(dataset, 4, sequence_length=32))[-1]
    assert len(last["labels"]) == (4 if kind == "names" else 2)
    assert model.loss(model.params, last)[1] == 2
    adapters, _ = qj.peft.load(tmp_path / "out", model)
    assert any(path.startswith("classifier") for path in adapters)


@pytest.mark.slow
def test_classes_are_evaluated_on_a_mesh_whatever_their_number(tokenizer, tmp_path):
    texts = [LabelledText((word,), i % 2) for i, word in enumerate(WORDS)]
    config = read_config(ROBERTA | {"vocab_size": len(tokenizer)})

    def run(texts, labels, output, **how):
        held_out = tokenize_labelled(texts[:5], tokenizer, 32, labels)
        dataset = tokenize_labelled(texts, tokenizer, 32, labels)
        with_head = config.with_head("classification", len(labels.names or "1"))
        model = qj.EncoderModel(with_head, quantized(with_head), tokenizer, "tiny", np.float32)
        result = trainer.fit(
            model,
            qj.LoraConfig(rank=2),
            dataset,
            TrainSettings(steps=1, batch_size=2),
            tmp_path / output,
            evaluation=held_out,
            display=False,
            **how,
        )
        return result.history[-1]

    mesh = qj.make_mesh("data=2", jax.devices()[:2])
    alone = run(texts, Labels.of(texts), "one")
    split = run(texts, Labels.of(texts), "two", mesh=mesh)
    assert alone["eval_tokens"] == split["eval_tokens"] == 5
    np.testing.assert_allclose(split["eval_loss"], alone["eval_loss"], rtol=1e-5)
    numbers = [LabelledText((word,), 0.5 + i) for i, word in enumerate(WORDS)]
    with pytest.raises(qj.QloraError, match="5 held-out examples .* hold out a multiple of 2"):
        run(numbers, Labels.of(numbers), "three", mesh=mesh)


def test_labels():
    def of(*labels):
        return Labels.of([LabelledText(("a",), label) for label in labels])

    assert of(0, 2).names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert of("b", "a", "b").names == ("a", "b")
    assert of(1, 2.5).names is None
    assert of("b", "a").array(LabelledText(("x",), "b")) == 1
    for bad, message in (
        (lambda: of(0, -1), "example: the class -1 is negative"),
        (lambda: of(0, "a"), "different kinds"),
        (lambda: of("a", "b").array(LabelledText(("x",), "z", "row 7")), "row 7: the label 'z'"),
        (lambda: of(1).array(LabelledText(("x",), 5, "row 7")), "row 7: the label 5"),
        (lambda: of(0.5).array(LabelledText(("x",), "z", "row 7")), "not a finite number"),
        (lambda: parse_labelled({"text": "a"}, "row 3"), r"row 3: found the fields \['text'\]"),
        (lambda: parse_labelled({"text": 1, "label": 0}, "row 3"), "'text' is int, not text"),
        (lambda: parse_labelled({"text": "a", "label": None}, "row 3"), "None is neither"),
    ):
        with pytest.raises(qj.QloraError, match=message):
            bad()


def test_columns_that_are_no_classes():
    def of(*labels):
        return Labels.of([LabelledText(("a",), x, f"row {i}") for i, x in enumerate(labels)])

    with pytest.raises(qj.QloraError, match="row 0: every row has the label 'a', which leaves"):
        of("a", "a")
    with pytest.raises(qj.QloraError, match="row 1: .* 1,001 classes of 3 rows, .* look like"):
        of(0, 1000, 1)
    with pytest.raises(qj.QloraError, match="row 10000: .* does not look like classes"):
        of(*range(10_001))
    assert len(of(0, 999).names) == 1000 and len(of(*range(1500)).names) == 1500


def test_pairs_are_cut_and_counted(tokenizer):
    rows = [{"prompt": "a" * 50, "completion": "b" * 5}, {"prompt": "a", "completion": "b"}]
    dataset = tokenize_seq2seq(
        rows_to_examples(rows), tokenizer, source_max_length=8, target_max_length=4
    )
    assert dataset.cut == 1 and max(map(len, dataset)) == 8
    assert [len(example.labels) for example in dataset] == [4, 1]
    with pytest.raises(qj.QloraError, match="packing is for decoders"):
        dataset.collate([[dataset[0]]], 32, packed=True)


def test_data_of_another_kind_is_refused(tokenizer, tmp_path):
    config = read_config(T5 | {"vocab_size": len(tokenizer)})
    model = Seq2SeqModel(config, {}, tokenizer, "tiny t5", np.float32)
    texts = [LabelledText(("a",), 0)]
    dataset = tokenize_labelled(texts, tokenizer, 8, Labels.of(texts))
    with pytest.raises(qj.QloraError, match="a Seq2SeqDataset, what .* makes, not on a L"):
        trainer.fit(model, qj.LoraConfig(), dataset, TrainSettings(steps=1), tmp_path / "out")
    config = read_config(ROBERTA | {"vocab_size": len(tokenizer)})
    encoder = qj.EncoderModel(config, {}, tokenizer, "tiny roberta", np.float32)
    wrong = dataclasses.replace(dataset, examples=tuple(dataset)[:1])
    wrong.examples[0].labels[...] = 7
    with pytest.raises(qj.QloraError, match="the label 7, which is neither one of 0 to 1"):
        trainer.fit(encoder, qj.LoraConfig(), wrong, TrainSettings(steps=1), tmp_path / "out")


def write_model(folder, tokenizer, config):
    """A dense checkpoint of random weights, with the tokenizer."""
    kind = Seq2SeqModel if config.model_type == "t5" else qj.EncoderModel
    params = init_params(config, jax.random.key(0))
    save_pretrained(folder, kind(config, params, tokenizer, "tiny", np.float32), dtype=np.float32)
    return folder


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
def test_the_command_line_trains_them_too(tokenizer, tmp_path, capsys):
    t5 = write_model(tmp_path / "t5", tokenizer, read_config(T5 | {"vocab_size": len(tokenizer)}))
    pairs = [{"input": word, "output": word[::-1]} for word in WORDS]
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    options = ["--training.steps", "1", "--training.batch-size", "2", "--lora.rank", "2"]
    out = ["--output", str(tmp_path / "out")]
    source = ["--data", f"{data},format=input-output"]
    cli.main(["train", "--model", str(t5), *source, *out, *options])
    assert "adapter in" in capsys.readouterr().out
    config = read_config(
        ROBERTA | {"vocab_size": len(tokenizer), "architectures": ["RobertaModel"]}
    )
    roberta = write_model(tmp_path / "roberta", tokenizer, config)
    rows = [{"text": word, "label": ("no", "yes")[len(word) > 4]} for word in WORDS]
    data = write_rows(tmp_path / "labels.jsonl", rows)
    named = json.loads((roberta / "config.json").read_text()) | {"id2label": {0: "yes", 1: "no"}}
    (tmp_path / "named").mkdir()
    for file in roberta.iterdir():
        (tmp_path / "named" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "named" / "config.json").write_text(json.dumps(named))
    source = ["--data", str(data), "--dataset-format", "classification", "--eval-count", "2"]
    out = ["--output", str(tmp_path / "classes")]
    cli.main(["train", "--model", str(roberta), *source, *out, *options])
    assert "labels: 0 = no, 1 = yes" in capsys.readouterr().out
    assert (tmp_path / "classes" / "adapter_model.safetensors").exists()
    out = ["--output", str(tmp_path / "pissa"), "--lora.init", "pissa"]
    cli.main(["train", "--model", str(tmp_path / "named"), *source, *out, *options])
    assert "labels: 0 = yes, 1 = no" in capsys.readouterr().out
    saved = json.loads((tmp_path / "pissa" / "adapter_config.json").read_text())
    assert "classifier" in saved["modules_to_save"]
    trained, merged = tmp_path / "classes", tmp_path / "merged"
    paths = ["--adapter", str(trained), "--output", str(merged)]
    cli.main(["merge", "--model", str(roberta), *paths])
    found = qj.load(merged).config
    assert found.labels == ("no", "yes") and found.problem_type == "single_label_classification"
    to = [str(tmp_path / "converted"), "--to", "safetensors", "--adapter", str(trained)]
    cli.main(["convert", str(roberta), *to])
    assert qj.load(tmp_path / "converted").config.labels == ("no", "yes")
    (trained / "labels.json").write_text('{"labels": ["no"]}')
    with pytest.raises(SystemExit):
        cli.main(["convert", str(roberta), str(tmp_path / "other"), *to[1:]])
    assert "expected the names of 2 labels" in capsys.readouterr().err
    # The head's former task does not stay with it.
    numbers = [{"text": word, "label": len(word) / 4} for word in WORDS]
    data = write_rows(tmp_path / "numbers.jsonl", numbers)
    source[1] = str(data)
    for problem in ("single_label_classification", "regression"):
        about = json.loads((merged / "config.json").read_text()) | {"problem_type": problem}
        (merged / "config.json").write_text(json.dumps(about))
        out = ["--output", str(tmp_path / problem)]
        cli.main(["train", "--model", str(merged), *source, *out, *options])
        source[1] = str(tmp_path / "labels.jsonl")
    for model in (t5, roberta):  # rows that they are not trained on
        wrong = source if model is t5 else ["--data", str(tmp_path / "pairs.jsonl"), *FORMAT]
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "--model", str(model), *wrong, "--output", str(tmp_path / "no")])
        assert stop.value.code == 2
