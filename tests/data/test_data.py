"""Rows to batches."""

import itertools
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

import qlora_jax as qj
from qlora_jax.data import (
    IGNORE,
    Message,
    batches,
    evaluation_batches,
    read_examples,
    rows_to_examples,
    tokenize,
)
from qlora_jax.data.order import mix
from qlora_jax.data.tokenize import encode_prompt, turn_end
from tests import tiny
from tests.training import models

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.write_checkpoint(tmp_path_factory.mktemp("t")))


def labelled(tokenizer, example) -> str:
    return tokenizer.decode(example.labels[example.labels != IGNORE])


def test_the_accepted_rows():
    chat, prompt, question = rows_to_examples(
        [
            {"messages": CHAT},
            {"prompt": "p", "completion": "c", "id": 3},
            {"question": "q", "answer": "a"},
        ]
    )
    assert chat.answer == "ciao" and len(chat.prompt) == 4
    assert prompt.messages == (Message("user", "p"), Message("assistant", "c"))
    assert question.answer == "a"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "a row must be an object, not list"),
        ("{", "not JSON"),
        pytest.param("1" * 5000, "cannot be read .*4300 digits", id="a long number"),
        pytest.param("[" * 100_000, "cannot be read .*recursion", id="a deep list"),
        ('{"prompt": "smile \\uD83D", "completion": "x"}', "half of a character"),
        ('{"text": "x"}', r"found the fields \['text'\]; expected one of"),
        ('{"prompt": 1, "completion": "x"}', "'prompt' is int, not text"),
        ('{"prompt": "x", "completion": ""}', "the answer is empty"),
        ('{"question": "x", "answer": "y", "context": "z"}', "has 'context', which no template"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "tools": [1]}', "has 'tools'"),
        (
            '{"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}',
            "message 0: has 'tool_calls'",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}',
            "message 0 has the weight 0; every answer is learned",
        ),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "the last message is the user's"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(row, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n\n' + row + "\n")
    with pytest.raises(qj.QloraError, match=message) as error:
        read_examples(path)
    assert f"{path}, line 3" in str(error.value)


def test_whole_characters_may_be_escaped(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "\\ud83d\\ude00", "completion": "c"}\n')
    (example,) = read_examples(tmp_path / "rows.jsonl")
    assert example.messages[0].content == "\N{GRINNING FACE}"


@pytest.mark.parametrize("error", ["RuntimeError", "DatasetGenerationError"])
def test_a_dataset_that_the_hub_does_not_give(error, monkeypatch):
    datasets = pytest.importorskip("datasets")
    kind = getattr(datasets.exceptions, error, RuntimeError)

    def load_dataset(*_, **__):
        raise kind("scripts are no longer supported\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(qj.QloraError, match=r"loaded \(scripts are no longer supported\)"):
        read_examples("owner/name")


@pytest.mark.parametrize(
    "source",
    ["data/train.csv", "./x", "../x", "~/x.parquet", "~/x", "/x", "x.txt", "a/b.jsonl.gz", "a/b/c"],
)
def test_a_missing_file_is_not_looked_up_on_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("qlora_jax.data.reading._hub_dataset", None)
    with pytest.raises(qj.QloraError, match="no such file"):
        read_examples(source)


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    assert len(read_examples("~/rows.jsonl")) == 1


@pytest.mark.parametrize("text", ['[{"prompt": "p"}]', '\n[\n  {"prompt": "p"}\n]'])
def test_an_array_is_not_one_object_a_line(text, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(qj.QloraError, match="rows.json: begins with a JSON array; write its"):
        read_examples(tmp_path / "rows.json")


def test_files_that_hold_nothing(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(qj.QloraError, match="no examples"):
        read_examples(tmp_path / "empty.jsonl")
    with pytest.raises(qj.QloraError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(qj.QloraError, match="a folder"):
        read_examples(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(qj.QloraError, match="not UTF-8"):
        read_examples(tmp_path / "latin.jsonl")


def test_only_answers_and_their_ends_are_labelled(tokenizer):
    (example,) = tokenize(rows_to_examples([{"messages": CHAT}]), tokenizer, 512)
    assert labelled(tokenizer, example) == "hello</s>ciao</s>"
    before = tokenizer.decode(example.input_ids[: np.argmax(example.labels != IGNORE)])
    assert before.endswith("user: hi</s>assistant: ")


def test_generation_starts_where_training_did(tokenizer):
    (example,) = rows_to_examples([{"prompt": "2+2", "completion": "4"}])
    for template in ("chat", "plain"):
        (ids,) = tokenize([example], tokenizer, 512, template)
        start = encode_prompt(tokenizer, example.prompt, template)
        assert ids.input_ids[: len(start)].tolist() == start
        assert (ids.labels[: len(start)] == IGNORE).all()
        assert (ids.labels[len(start) :] == ids.input_ids[len(start) :]).all()
        assert labelled(tokenizer, ids) == "4</s>"


def test_a_template_that_rewrites_the_past_is_refused(tokenizer, monkeypatch):
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(qj.QloraError, match="before message 2 are no prefix of the whole"):
        tokenize(rows_to_examples([{"messages": CHAT}], "here"), tokenizer, 512)


def test_a_token_that_ends_whole_conversations_only(tokenizer, monkeypatch):
    """As Phi-3's template writes it: no turn but the last has it."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    (example,) = tokenize(rows_to_examples([{"messages": CHAT}]), tokenizer, 512)
    assert labelled(tokenizer, example) == "hello;ciao;</s>"


def test_templates_are_told_the_day_that_is_said(tokenizer, monkeypatch):
    """So that a run which is resumed on another day has the same tokens."""
    dated = "{{ strftime_now('%d %b %Y') }};" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", dated)
    rows = rows_to_examples([{"messages": CHAT}])
    before = tokenize(rows, tokenizer, 512, today="2024-07-26")
    assert before.today == "2024-07-26"
    assert "26 Jul 2024;" in tokenizer.decode(before[0].input_ids)
    now = tokenize(rows, tokenizer, 512)
    assert now.today is not None and now.today >= "2026"
    again = tokenize(rows, tokenizer, 512, today=now.today)
    assert again[0].input_ids.tolist() == now[0].input_ids.tolist()
    assert mix([before, before], [1, 1]).today == before.today
    plain = rows_to_examples([{"prompt": "a", "completion": "b"}])
    assert tokenize(plain, tokenizer, 512, "plain").today is None


def test_the_token_that_ends_a_turn(tokenizer, monkeypatch):
    """Which generation stops at too: it need not be the tokenizer's EOS."""
    assert turn_end(tokenizer) == tokenizer.eos_token_id
    template = tokenizer.chat_template
    assert "</s>" in template
    monkeypatch.setattr(tokenizer, "chat_template", template.replace("</s>", "<s>"))
    assert turn_end(tokenizer) == tokenizer.bos_token_id
    monkeypatch.setattr(tokenizer, "chat_template", template.replace("</s>", "."))
    assert turn_end(tokenizer) is None
    refusing = "{{ raise_exception('a system turn first') }}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    assert turn_end(tokenizer) is None
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert turn_end(tokenizer) is None


def test_what_a_conversation_begins_with_is_no_answer(tokenizer):
    greeting = [{"role": "assistant", "content": "welcome"}]
    rows = [{"messages": greeting + CHAT[1:]}, {"messages": CHAT}]
    example, _ = tokenize(rows_to_examples(rows), tokenizer, 512)
    assert labelled(tokenizer, example) == "hello</s>ciao</s>"
    assert "welcome" in tokenizer.decode(example.input_ids)


def test_long_examples_are_cut_or_dropped(tokenizer):
    rows = [
        {"prompt": "p" * 5, "completion": "c" * 50},
        {"prompt": "p" * 50, "completion": "c"},
        {"prompt": "p", "completion": "c"},
    ]
    dataset = tokenize(rows_to_examples(rows), tokenizer, 40, "plain")
    assert (len(dataset), dataset.cut, dataset.dropped) == (2, 1, 1)
    assert max(map(len, dataset)) == 40
    with pytest.raises(qj.QloraError, match="none of 1 examples"):
        tokenize(rows_to_examples(rows[1:2]), tokenizer, 40, "plain")


def test_every_epoch_sees_every_example_once_in_another_order():
    dataset = models.dataset(10)
    stream = batches(dataset, 4, seed=0, sequence_length=32)
    rows = np.concatenate([b["input_ids"] for b in itertools.islice(stream, 5)])
    names = [row.tobytes() for row in rows]
    assert len(set(names[:10])) == len(set(names[10:])) == 10
    assert names[:10] != names[10:]
    assert sorted(names[:10]) == sorted(names[10:])


def test_order_depends_on_seed_and_step_alone():
    dataset = models.dataset(10)

    def first(count, **options):
        options = {"seed": 0, "sequence_length": 32} | options
        stream = batches(dataset, 4, **options)
        return json.dumps([b["input_ids"].tolist() for b in itertools.islice(stream, count)])

    assert first(3) == first(3) != first(3, seed=1)
    assert first(5)[-300:] == first(2, start_step=3)[-300:]


def test_padding_is_masked_and_not_labelled():
    dataset = models.dataset(3)
    (batch, last) = evaluation_batches(dataset, 2, sequence_length=24)
    assert batch["input_ids"].shape == last["input_ids"].shape == (2, 24)
    for row, example in zip(batch["attention_mask"], dataset, strict=False):
        assert row.sum() == len(example)
    assert (last["labels"][1] == IGNORE).all() and last["attention_mask"][1].sum() == 1
    with pytest.raises(qj.QloraError, match="there is an example of"):
        next(batches(dataset, 2, seed=0, sequence_length=3))
