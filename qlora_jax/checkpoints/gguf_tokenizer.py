"""A fast tokenizer as GGUF's metadata: what `tokenizer.from_gguf` reads, the other way round."""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_jax.checkpoints.tokenizer import (
    CONTROL,
    SPLITS,
    USER_DEFINED,
    WHOLE_WORDS,
    sentence_piece_merges,
)
from qlora_jax.errors import QloraError
from qlora_jax.models import LlamaConfig

logger = logging.getLogger("qlora_jax.export")
_NORMAL, _UNKNOWN, _UNUSED, _BYTE = 1, 2, 5, 6
_SPACE = "▁"


def add_tokenizer(writer: Any, tokenizer: Any, config: LlamaConfig) -> None:
    """Vocabulary, merges, special tokens and chat template of `tokenizer` into a GGUFWriter.

    Without a tokenizer (None) only the numbers that the configuration has. Rows of the embedding
    that have no token are filled with unused ones. Raises QloraError for a tokenizer that GGUF has
    no name for, or that has more tokens than the model.
    """
    _add_special(writer, tokenizer, config)
    if tokenizer is None:
        return
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise QloraError(f"a tokenizer of type {model['type']} cannot be put into GGUF; only BPE")
    numbers, size = tokenizer.get_vocab(), config.vocab_size
    if (largest := max(numbers.values())) >= size:
        raise QloraError(f"the tokenizer counts up to {largest}, the model has {size} tokens")
    tokens, types = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    for token, number in numbers.items():
        tokens[number], types[number] = token, _NORMAL
    merges = [_pair(merge) for merge in model["merges"]]
    if model["byte_fallback"]:
        _add_sentence_piece(writer, state, merges, tokens, types)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_cutting(state))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    _mark_added(types, state["added_tokens"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_ends(writer, tokenizer)
    if template := tokenizer.chat_template:
        writer.add_chat_template(_templates(template))


def _add_special(writer: Any, tokenizer: Any, config: LlamaConfig) -> None:
    """The numbers of special tokens; of several that end a text the first."""
    ends = config.eos_token_id
    known = {"bos": config.bos_token_id, "eos": ends[0] if ends else None, "unk": None}
    for name, number in {**known, "pad": config.pad_token_id}.items():
        own = getattr(tokenizer, f"{name}_token_id", None)
        number = number if own is None else own
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _cutting(state: Mapping[str, Any]) -> str:
    """GGUF's name of the rule by which a byte-level tokenizer cuts text before it merges."""
    given = [_essence(step) for step in _steps(state["pre_tokenizer"], "pretokenizers")]
    whole_words = state["model"].get("ignore_merges", False)
    known = {"gpt-2": [("ByteLevel", True)], "smollm": [("Digits", True), ("ByteLevel", True)]}
    known |= {name: [("Split", text), ("ByteLevel", False)] for name, text in SPLITS.items()}
    for name, steps in known.items():
        if steps == given and whole_words == (name in WHOLE_WORDS):
            return name
    raise QloraError(
        f"the tokenizer cuts text by a rule that GGUF has no name for: {state['pre_tokenizer']} "
        f"(ignore_merges {whole_words}); known are those of {', '.join(known)}"
    )


def _essence(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """A step of a pre-tokenizer by what makes a difference."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel", step["use_regex"]
    if step["type"] == "Digits":
        return "Digits", step["individual_digits"]
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return "Split", step["pattern"].get("Regex")
    return (step["type"],)


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Any]:
    """The members of a sequence; of a part that is none, itself."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for member in part[key] for step in _steps(member, key)]


def _add_sentence_piece(
    writer: Any,
    state: Mapping[str, Any],
    merges: list[tuple[str, str]],
    tokens: list[str],
    types: list[int],
) -> None:
    """SentencePiece's BPE, whose merges GGUF holds as scores of the tokens that they make."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(_begins_with_space(state))
    ranks: dict[str, int] = {}
    for pair in merges:
        ranks.setdefault("".join(pair), len(ranks))
    scores = [-float(ranks.get(token, 0)) for token in tokens]
    writer.add_token_scores(scores)
    _check_merges(merges, tokens, scores, {token["content"] for token in state["added_tokens"]})
    for number, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = _BYTE
        if token == state["model"]["unk_token"]:
            types[number] = _UNKNOWN


def _check_merges(
    merges: list[tuple[str, str]], tokens: list[str], scores: list[float], added: set[str]
) -> None:
    """Raises QloraError unless the scores give the merges back, up to the order within a token."""

    def by_token(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, set[tuple[str, str]]]]:
        grouped: dict[str, set[tuple[str, str]]] = {}
        for pair in pairs:
            if (token := "".join(pair)) not in added:
                grouped.setdefault(token, set()).add(pair)
        return list(grouped.items())

    vocabulary = {token: number for number, token in enumerate(tokens)}
    again = sentence_piece_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    if by_token(again) != by_token(merges):
        raise QloraError(
            "the tokenizer falls back to bytes as SentencePiece's do, but its merges are not those "
            "of a SentencePiece model; GGUF cannot hold them"
        )


def _begins_with_space(state: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text; QloraError for any other rewriting of it."""
    prefix = False
    steps = _steps(state["normalizer"], "normalizers")
    steps += _steps(state["pre_tokenizer"], "pretokenizers")
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Metaspace" and step["replacement"] == _SPACE and not step["split"]:
            prefix = prefix or step["prepend_scheme"] != "never"
        elif step["type"] != "Replace" or step["content"] != _SPACE:
            raise QloraError(f"the tokenizer rewrites text by a rule that GGUF lacks: {step}")
    return prefix


def _mark_added(types: list[int], added: list[Mapping[str, Any]]) -> None:
    for token in added:
        number = token["id"]
        if types[number] != _UNKNOWN:
            types[number] = CONTROL if token["special"] else USER_DEFINED
        if token["lstrip"] or token["rstrip"]:
            logger.warning(
                "token %r takes the spaces beside it; GGUF cannot say so, and programs that read "
                "the file will keep them",
                token["content"],
            )


def _add_ends(writer: Any, tokenizer: Any) -> None:
    """Whether every text gets the first and the last token."""
    ids = tokenizer("a")["input_ids"]
    for end, at in (("bos", 0), ("eos", -1)):
        number = getattr(tokenizer, f"{end}_token_id")
        if number is not None:
            getattr(writer, f"add_add_{end}_token")(ids[at] == number)


def _templates(template: str | Mapping[str, str]) -> Any:
    if isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]
