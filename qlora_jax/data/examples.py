"""Rows that are told by their fields, brought to one form: a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlora_jax.data.reading import read_rows
from qlora_jax.errors import QloraError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
# The two fields of a one-turn row: what is asked, what is answered.
PAIRS = (("prompt", "completion"), ("question", "answer"))
# Fields with a meaning that a template would not be told: refused, not passed over.
LOST = {
    "row": ("tools", "functions"),
    "message": ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
    "question": ("context",),
}
EXPECTED = (
    'one of {"messages": [{"role", "content"}, ...]}, {"prompt", "completion"}, '
    '{"question", "answer"}'
)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation with at least one assistant turn; `where` names its origin in errors."""

    messages: tuple[Message, ...]
    where: str = field(default="example", compare=False)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last one."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last turn, which is the assistant's."""
        return self.messages[-1].content


def _row_error(where: str, problem: str) -> QloraError:
    return QloraError(f"{where}: {problem}; expected {EXPECTED}")


def _refuse_lost(fields: Mapping[Any, Any], kind: str, where: str) -> None:
    """Raises QloraError if a row, a message or a question has what would be lost."""
    if found := [name for name in LOST[kind] if fields.get(name)]:
        raise QloraError(
            f"{where}: has {' and '.join(map(repr, found))}, which no template is told here, so "
            "that it would be lost: write it into the text that it belongs to, or remove it"
        )


def _parse_messages(value: object, where: str) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise _row_error(where, "'messages' must be a list with at least one message")
    messages: list[Message] = []
    for number, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise _row_error(where, f"message {number} is {type(item).__name__}, not an object")
        role, content = item.get("role"), item.get("content")
        if role not in ROLES:
            raise _row_error(where, f"message {number} has role {role!r}, not one of {ROLES}")
        if not isinstance(content, str):
            raise _row_error(where, f"message {number} has no text in 'content'")
        _refuse_lost(item, "message", f"{where}: message {number}")
        if item.get("weight", 1) != 1:
            raise QloraError(
                f"{where}: message {number} has the weight {item['weight']!r}; every answer is "
                "learned alike: split the conversation into rows that end with what is to be "
                "learned"
            )
        messages.append(Message(role, content))
    if messages[-1].role != "assistant":
        raise _row_error(where, f"the last message is the {messages[-1].role}'s, not an answer")
    return tuple(messages)


def parse_row(row: object, where: str) -> Example:
    """One row to one Example.

    Raises QloraError, beginning with `where`, if the row has none of the accepted forms, an empty
    answer, or fields whose meaning would be lost (tools, a context).
    """
    if not isinstance(row, Mapping):
        raise _row_error(where, f"a row must be an object, not {type(row).__name__}")
    if "messages" in row:
        messages = _parse_messages(row["messages"], where)
        _refuse_lost(row, "row", where)
    else:
        pair = next((pair for pair in PAIRS if all(name in row for name in pair)), None)
        if pair is None:
            raise _row_error(where, f"found the fields {sorted(map(str, row))}")
        for name in pair:
            if not isinstance(row[name], str):
                raise _row_error(where, f"{name!r} is {type(row[name]).__name__}, not text")
        if pair[0] == "question":
            _refuse_lost(row, "question", where)
        messages = (Message("user", row[pair[0]]), Message("assistant", row[pair[1]]))
    if not messages[-1].content:
        raise _row_error(where, "the answer is empty")
    return Example(messages, where)


def rows_to_examples(rows: Iterable[object], name: str = "rows") -> list[Example]:
    """Any iterable of mappings, a `datasets.Dataset` included, to Examples.

    Raises QloraError naming the row's number on the first bad row, or if there is no row.
    """
    examples = [parse_row(row, f"{name}, row {number}") for number, row in enumerate(rows)]
    if not examples:
        raise QloraError(f"{name}: no examples; expected {EXPECTED}")
    return examples


def read_examples(source: str | Path, split: str = "train") -> list[Example]:
    """Reads a JSON lines file, or a dataset of the Hugging Face Hub.

    source and split are as for `read_rows`, whose errors it raises. Raises QloraError, with file
    and line number, for the first row that cannot be used, and if there is no row.
    """
    examples = [parse_row(row, where) for where, row in read_rows(source, split)]
    if not examples:
        raise QloraError(f"{source}: no examples; expected a JSON object a line, {EXPECTED}")
    return examples
