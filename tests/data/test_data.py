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
from qlora_jax.data.tokenize import encode_prompt
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
        ('{"text": "x"}', r"found the fields \['text'\]; expected one of"),
        ('{"prompt": 1, "completion": "x"}', "'prompt' is int, not text"),
        ('{"prompt": "x", "completion": ""}', "the answer is empty"),
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
