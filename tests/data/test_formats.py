"""The datasets that qlora.py reads, with rows as they have them, and how they are asked for."""

import dataclasses
import json
from typing import get_args

import pytest
from transformers import AutoTokenizer

import qlora_jax as qj
from qlora_jax import cli
from qlora_jax.commands.data_options import DataOptions, Source
from qlora_jax.commands.train import Train
from qlora_jax.data import IGNORE, Pair, PairFormat, read_pairs, rows_to_pairs, tokenize_pairs
from tests import tiny
from tests.training import models

ROWS = {
    "alpaca": [
        {
            "instruction": "Name the {capital}.",
            "input": "",
            "output": "Paris",
            "text": "Below is an instruction ... Paris",
        },
        {"instruction": "Add.", "input": "2 and 3", "output": "5", "text": "..."},
    ],
    "chip2": [
        {
            "text": "<human>: Hi, how are you?\n<bot>: Fine.\nAnd you?\n",
            "metadata": {"source": "unified_chip2"},
        }
    ],
    "self-instruct": [{"prompt": "Sort: b a. Output:", "completion": " a b"}],
    "hh-rlhf": [
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Go away",
        }
    ],
    "oasst1": [{"text": "### Human: What is JAX?### Assistant: A library."}],
    "input-output": [{"input": "", "output": "once upon a time"}],
    "longform": [
        {"input": "Write about bees.", "output": "Bees fly.", "source": "wiki", "subset": "x"}
    ],
    "unnatural-instructions": [
        {
            "instruction": "Translate.",
            "instances": [
                {
                    "instruction_with_input": "Translate: chat",
                    "input": "chat",
                    "constraints": "None.",
                    "output": "cat",
                },
                {
                    "instruction_with_input": "Translate: chien",
                    "input": "chien",
                    "constraints": "None.",
                    "output": "dog",
                },
            ],
        }
    ],
    "text": [{"text": "any text at all"}],
}
BELOW = "Below is an instruction that describes a task"
PAIRS = {
    "alpaca": [
        (
            f"{BELOW}. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nName the {capital}.\n\n### Response: ",
            "Paris",
        ),
        (
            f"{BELOW}, paired with an input that provides further context. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n"
            "2 and 3\n\n### Response: ",
            "5",
        ),
    ],
    "chip2": [("Hi, how are you?", "Fine.\nAnd you?\n")],
    "self-instruct": [("Sort: b a. Output:", " a b")],
    "hh-rlhf": [("", "\n\nHuman: Hi\n\nAssistant: Hello")],
    "oasst1": [("", "### Human: What is JAX?### Assistant: A library.")],
    "input-output": [("", "once upon a time")],
    "longform": [("Write about bees.", "Bees fly.")],
    "unnatural-instructions": [("Translate: chat", "cat"), ("Translate: chien", "dog")],
    "text": [("", "any text at all")],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.write_checkpoint(tmp_path_factory.mktemp("t")))


@pytest.mark.parametrize("name", get_args(PairFormat))
def test_rows_of_each_dataset(name, tmp_path):
    found = rows_to_pairs(ROWS[name], name)
    assert [(pair.source, pair.target) for pair in found] == PAIRS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS[name]))
    assert read_pairs(path, name) == found


def test_instances_that_are_none():
    row = {"instances": {"instruction_with_input": ["a", "b"], "output": ["c"]}}
    with pytest.raises(qj.QloraError, match="instruction_with_input and output of 'instances'"):
        rows_to_pairs([row], "unnatural-instructions")
    with pytest.raises(qj.QloraError, match="'instances' has NoneType, expected objects"):
        rows_to_pairs([{"instances": [None]}], "unnatural-instructions")
    none = {"instances": {"instruction_with_input": None, "output": None}}
    rows = [none, *ROWS["unnatural-instructions"]]
    assert len(rows_to_pairs(rows, "unnatural-instructions")) == 2


def test_instances_that_the_datasets_library_turned_into_columns():
    row = dict(ROWS["unnatural-instructions"][0])
    row["instances"] = {
        name: [instance[name] for instance in row["instances"]] for name in row["instances"][0]
    }
    assert rows_to_pairs([row], "unnatural-instructions") == [
        Pair(*texts) for texts in PAIRS["unnatural-instructions"]
    ]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("alpaca", {"prompt": "x"}, r"rows, row 1: no field 'instruction'; found .*'prompt'"),
        (
            "chip2",
            {"text": "<human>: x"},
            "rows, row 1: 'text' has no line that begins with '<bot>",
        ),
        ("oasst1", {"text": None}, "'text' is NoneType, not text; this is no row of format oasst1"),
        ("unnatural-instructions", {"instances": 3}, "no list 'instances'"),
        ("longform", [1], "a row must be an object, not list"),
        ("nonsense", {}, "no dataset format 'nonsense'; known: alpaca, chip2"),
    ],
)
def test_rows_of_another_format_are_named(name, row, message):
    good = ROWS.get(name, [{}])[0]
    with pytest.raises(qj.QloraError, match=message):
        rows_to_pairs([good, row], name)


def test_source_and_target_are_tokenized_apart(tokenizer):
    pairs = [Pair("abc", "de"), Pair("", "fg"), Pair("x" * 20, "y" * 20), Pair("no answer", "")]
    limits = {"source_max_length": 8, "target_max_length": 6}
    dataset = tokenize_pairs(pairs, tokenizer, **limits)
    assert (len(dataset), dataset.cut, dataset.dropped, dataset.max_length) == (3, 1, 1, 14)
    assert [tokenizer.decode(example.input_ids) for example in dataset] == [
        "<s>abcde</s>",
        "<s>fg</s>",
        "<s>" + 7 * "x" + 6 * "y",
    ]
    learned = [tokenizer.decode(e.labels[e.labels != IGNORE]) for e in dataset]
    assert learned == ["de</s>", "fg</s>", 6 * "y"]
    both = tokenize_pairs(pairs, tokenizer, train_on_source=True, **limits)
    assert all((example.labels == example.input_ids).all() for example in both)
    with pytest.raises(qj.QloraError, match="none of 1 examples has a target"):
        tokenize_pairs(pairs[-1:], tokenizer)
    with pytest.raises(qj.QloraError, match="must be at least 1, got 0 and 256"):
        tokenize_pairs(pairs, tokenizer, source_max_length=0)


def test_a_source_with_its_format_and_weight():
    assert Source.parse("a,b.jsonl") == Source("a,b.jsonl")
    assert Source.parse("owner/name:main@train[:9],weight=2,format=alpaca") == Source(
        "owner/name:main@train[:9]", "alpaca", 2.0
    )
    with pytest.raises(qj.QloraError, match="no format 'alpca'; known: auto, class"):
        Source.parse("a.jsonl,format=alpca")
    with pytest.raises(qj.QloraError, match="weight 'much' is no number"):
        Source.parse("a.jsonl,weight=much")


@pytest.fixture
def files(tmp_path):
    chat = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(30)]
    alpaca = [{"instruction": f"i{n}", "input": "", "output": f"o{n}"} for n in range(10)]
    paths = tmp_path / "chat.jsonl", tmp_path / "alpaca.jsonl"
    for path, rows in zip(paths, (chat, alpaca), strict=True):
        path.write_text("\n".join(map(json.dumps, rows)))
    return tuple(map(str, paths))


def decoder(tokenizer) -> qj.Model:
    return dataclasses.replace(models.model(), tokenizer=tokenizer)


def test_sources_are_mixed(files, tokenizer):
    chat, alpaca = files
    options = DataOptions(data=(f"{chat},weight=1", f"{alpaca},weight=3,format=alpaca"))
    train, held_out, weights = options.read(seed=0)
    assert not held_out and weights == [1.0, 3.0]
    model = decoder(tokenizer)
    dataset = options.tokenize_all(train, weights, model, None)
    assert dataset.parts == ((30, 1.0), (10, 3.0))
    assert "### Instruction:\ni9" in tokenizer.decode(dataset[39].input_ids)
    plain = DataOptions(data=(alpaca,), dataset_format="alpaca")
    assert plain.tokenize_all(*plain.read(seed=0)[::2], model, None).parts == ((10, 10.0),)


def test_the_split_is_seeded(files, tokenizer):
    options = DataOptions(data=(files[0], f"{files[1]},format=alpaca"), eval_count=8)
    train, held_out, weights = options.read(seed=1)
    again, other = options.read(seed=1), options.read(seed=2)
    assert again[:2] == (train, held_out) and other[1] != held_out and weights is None
    assert sum(map(len, held_out)) == 8 and sum(map(len, train)) == 32
    everything = [row for part in (train, held_out) for rows in part for row in rows]
    assert len({repr(row) for row in everything}) == 40
    assert len(options.tokenize_all(held_out, None, decoder(tokenizer), None)) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ("{0},weight=1", "{1},format=alpaca")}, "a weight to each source or to none"),
        ({"data": ()}, "at least one source"),
        ({"eval_count": 40}, "leaves none of 40 rows"),
        ({"eval_data": "{0}"}, "has the same rows as --data"),
        ({"data": ("{1},format=alpaca",), "template": "chat"}, "whole as they are"),
    ],
)
def test_options_that_make_no_sense(files, changes, message):
    changes = {"data": ("{0}", "{1},format=alpaca")} | changes
    filled = {
        name: tuple(text.format(*files) for text in value)
        if isinstance(value, tuple)
        else value.format(*files)
        if isinstance(value, str)
        else value
        for name, value in changes.items()
    }
    with pytest.raises(qj.QloraError, match=message):
        DataOptions(**filled).read(seed=0)


def test_a_mixture_in_a_settings_file(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(Train, "run", lambda self: ran.append(self))
    settings = tmp_path / "s.yaml"
    settings.write_text(
        "model: m\noutput: o\ndataset_format: oasst1\ntrain_on_source: true\ndata:\n"
        "  - {path: a.jsonl, weight: 0.7}\n  - {path: 'owner/b:c', format: alpaca, weight: 0.3}\n"
    )
    cli.main(["train", "--config", str(settings)])
    (found,) = ran
    assert found.data == ("a.jsonl,weight=0.7", "owner/b:c,format=alpaca,weight=0.3")
    assert found.dataset_format == "oasst1" and found.train_on_source
    settings.write_text("data: [{weight: 1}]\n")
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(settings)])
    assert "needs a `path`" in capsys.readouterr().err
