"""Conversations to token ids, with labels on the assistant's answers only.

The mask is found by tokenizing prefixes: the conversation up to an answer, with the template's
generation prompt, must tokenize to a prefix of the whole conversation's ids. So the model is
trained at exactly the place where generation starts, or there is an error.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal, overload

import numpy as np

from qlora_jax.data.collate import Batch, TokenizedExample, collate
from qlora_jax.data.convert import convert
from qlora_jax.data.examples import Example, Message
from qlora_jax.errors import QloraError, missing
from qlora_jax.models.loss import IGNORE
from qlora_jax.parallel.exchange import gather

Template = Literal["auto", "chat", "plain"]

_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")


@dataclass(frozen=True)
class TokenizedDataset(Sequence[TokenizedExample]):
    """Tokenized examples, and what max_length did to them.

    cut: examples shortened on the right. dropped: examples left out because nothing of the answer
    remained. max_length: the limit itself, None if there was none. parts: of a mixture, the number
    of examples and the weight of each dataset in it; else empty. today: the day, as YYYY-MM-DD,
    that a chat template was told; None if there was no template.
    """

    examples: tuple[TokenizedExample, ...]
    pad_id: int
    cut: int = 0
    dropped: int = 0
    max_length: int | None = None
    parts: tuple[tuple[int, float], ...] = ()
    today: str | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TokenizedExample, ...]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | tuple[TokenizedExample, ...]:
        return self.examples[index]

    def __iter__(self) -> Iterator[TokenizedExample]:
        return iter(self.examples)

    def collate(
        self, rows: Sequence[Sequence[TokenizedExample]], length: int, *, packed: bool = False
    ) -> Batch:
        """Arrays [B, length] of the examples in each row: see `collate`."""
        return collate(rows, length, self.pad_id, packed=packed)

    @property
    def filler(self) -> TokenizedExample | None:
        """An example without a label, to fill a batch with, if there can be one.

        Its one position is attended, so that no row of the attention is empty.
        """
        return TokenizedExample(np.full(1, self.pad_id, np.int32), np.full(1, IGNORE, np.int32))

    @property
    def answer_tokens(self) -> int:
        """How many positions count in the loss."""
        return sum(int(np.sum(example.labels != IGNORE)) for example in self.examples)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} examples, {sum(map(len, self.examples))} tokens, "
            f"{self.answer_tokens} in answers, {self.cut} cut, {self.dropped} dropped)"
        )


def padding_id(tokenizer: Any) -> int:
    """What padding is filled with: the tokenizer's own padding token, EOS, or token 0."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in found if token is not None), 0)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text`, with nothing added: templates carry their own special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    generation_prompt: bool,
    today: str | None = None,
) -> str:
    """`messages` through the tokenizer's chat template, as text.

    today: the day, as YYYY-MM-DD, for templates that ask (`strftime_now`); None: it is asked now.
    Raises QloraError with the template's own words if it refuses them (no system turn, say).
    """
    try:
        from jinja2 import TemplateError
    except ModuleNotFoundError as error:
        raise missing("jinja2", "a chat template", "hf") from error
    try:
        return tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            chat_template=None if today is None else _dated(tokenizer, today),
        )
    except TemplateError as error:
        raise QloraError(f"the chat template refuses the conversation: {error}") from error


def _dated(tokenizer: Any, today: str) -> str | None:
    """The chat template with the day in the place of its clock; None if it has no clock.

    transformers hands templates no function, so that another clock cannot be.
    """
    template = tokenizer.get_chat_template()
    if not _CLOCK.search(template):
        return None
    day = datetime.fromisoformat(today)
    return _CLOCK.sub(lambda call: json.dumps(day.strftime(call["format"])), template)


def turn_end(tokenizer: Any) -> int | None:
    """The special token by which the chat template ends an answer, None if there is none.

    It need not be the tokenizer's EOS: base models often have one that ends documents.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    answer = "yes"
    turns = (Message("user", "no"), Message("assistant", answer))
    try:
        text = render(tokenizer, turns, generation_prompt=False)
    except QloraError:  # a template for other conversations than this one
        return None
    _, found, after = text.rpartition(answer)
    ids = encode(tokenizer, after.lstrip()) if found else []
    # all_special_ids knows those with a name alone, not Llama 3's <|eot_id|>.
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    return ids[0] if ids and ids[0] in special.union(tokenizer.all_special_ids) else None


def uses_chat(tokenizer: Any, template: Template) -> bool:
    """Whether `template` means the tokenizer's chat template ("auto": if it has one)."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if template == "chat" and not has_template:
        raise QloraError("the tokenizer has no chat template; use template 'plain'")
    return has_template if template == "auto" else template == "chat"


def encode_prompt(
    tokenizer: Any, messages: Sequence[Message], template: Template = "auto"
) -> list[int]:
    """The ids after which the model answers: what generation starts from."""
    if uses_chat(tokenizer, template):
        return encode(tokenizer, render(tokenizer, messages, generation_prompt=True))
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return begin + encode(tokenizer, "\n".join(message.content for message in messages))


def _label_chat(tokenizer: Any, example: Example, today: str) -> tuple[list[int], list[int]]:
    def rendered(messages: Sequence[Message], generation_prompt: bool) -> str:
        return render(tokenizer, messages, generation_prompt=generation_prompt, today=today)

    whole = rendered(example.messages, False)
    ids = encode(tokenizer, whole)
    labels = [IGNORE] * len(ids)
    for turn, message in enumerate(example.messages):
        # What a conversation begins with answers nothing: chat templates cannot ask for it.
        if message.role != "assistant" or turn == 0:
            continue
        before = rendered(example.messages[:turn], True)
        start, end = encode(tokenizer, before), ids
        if turn + 1 < len(example.messages):
            after = rendered(example.messages[: turn + 1], False)
            end = encode(tokenizer, after)
            # Some templates end a whole conversation with a token that no turn has (Phi-3's).
            if end[-1:] == [tokenizer.eos_token_id] and ids[: len(end)] != end:
                end = end[:-1]
        if ids[: len(start)] != start or ids[: len(end)] != end or len(start) >= len(end):
            raise QloraError(
                f"the tokens before message {turn} are no prefix of the whole conversation's, so "
                "its answer cannot be told apart: the chat template rewrites earlier turns (split "
                "the conversation into one row for each answer), or the answer's first characters "
                "merge with what stands before them (strip white space from its beginning)"
            )
        stop = len(end)
        # What a template writes after the end-of-turn token is never generated: leave it out.
        for place in range(len(start), len(end)):
            if ids[place] == tokenizer.eos_token_id:
                stop = place + 1
        labels[len(start) : stop] = ids[len(start) : stop]
    return ids, labels


def _label_plain(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    if any(message.role == "assistant" for message in example.prompt):
        raise QloraError("a conversation of several answers needs a chat template")
    prompt = encode_prompt(tokenizer, example.prompt, "plain")
    answer = encode(tokenizer, example.answer)
    if tokenizer.eos_token_id is not None:
        answer.append(tokenizer.eos_token_id)
    return prompt + answer, [IGNORE] * len(prompt) + answer


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    template: Template = "auto",
    *,
    share: bool = False,
    today: str | None = None,
) -> TokenizedDataset:
    """Tokenizes conversations; every assistant turn, up to and with its end token, is labelled, but
    not one that a conversation begins with.

    tokenizer: a transformers fast tokenizer. max_length: longer examples are cut on the right, and
    dropped if no label remains. template: "chat" applies the tokenizer's chat template, "plain"
    joins prompt and completion, "auto" is "chat" where there is a template. share: of several
    processes, which must all call this alike, each tokenizes a part, and they exchange the results.
    today: the day, as YYYY-MM-DD, that templates which write the date are told; None: this day. A
    run that is resumed on another needs that of its beginning, the dataset's `today`. Raises
    QloraError if the answers cannot be told apart, or if no example is left.
    """
    if max_length < 2:
        raise QloraError(f"max_length must be at least 2, not {max_length}")
    label: Callable[[Any, Example], tuple[list[int], list[int]]] = _label_plain
    day = None
    if uses_chat(tokenizer, template):
        day = today or date.today().isoformat()
        day = gather(day)[0] if share else day  # at midnight processes may disagree
        label = functools.partial(_label_chat, today=day)

    def one(example: Example) -> tuple[TokenizedExample, bool] | None:
        try:
            ids, labels = label(tokenizer, example)
        except QloraError as error:
            raise QloraError(f"{example.where}: {error}") from error
        too_long = len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        # The first position has no predecessor to be predicted from.
        if all(value == IGNORE for value in labels[1:]):
            return None
        arrays = np.asarray(ids, np.int32), np.asarray(labels, np.int32)
        return TokenizedExample(*arrays, example.where), too_long

    kept, cut = convert(examples, one, share)
    if not kept:
        raise QloraError(
            f"none of {len(examples)} examples has a part of its answer within "
            f"max_length={max_length} tokens"
        )
    dropped = len(examples) - len(kept)
    return TokenizedDataset(kept, padding_id(tokenizer), cut, dropped, max_length, today=day)
