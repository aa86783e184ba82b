"""Tokenizers: those of Hugging Face folders, and those inside GGUF files."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.checkpoints.gguf import GGUFFile
from qlora_jax.errors import QloraError, missing, reason

_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"),
    *("vocab.txt", "spiece.model", "spm.model"),
)

# How byte-level vocabularies cut text before merging: the regular expressions of their authors.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "qwen2": _QWEN2}
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
"""Whose words that are tokens as they stand are taken whole (Llama 3's rule)."""

# Types of tokens in GGUF: control tokens such as <s>, and tokens that the user added.
CONTROL, USER_DEFINED = 3, 4


def from_folder(folder: Path) -> Any:
    """The folder's tokenizer as transformers reads it (no code is run), or None if it has none."""
    if not any((folder / name).is_file() for name in _FILES):
        return None
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise missing("transformers", "reading a tokenizer", "hf") from error
    with _read_from(str(folder)):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def from_gguf(file: GGUFFile) -> Any:
    """The tokenizer in a GGUF file; None if the file has none. QloraError for an unknown kind."""
    kind = file.field("tokenizer.ggml.model")
    if kind is None:
        return None
    try:
        from transformers import PreTrainedTokenizerFast
    except ModuleNotFoundError as error:
        raise missing("transformers", "reading a tokenizer", "hf") from error
    with _read_from(file.source):
        if kind == "gpt2":
            tokenizer = _byte_level(file)
        elif kind == "llama":
            tokenizer = _sentence_piece(file)
        else:
            raise QloraError(f"{file.source}: a tokenizer of kind {kind!r} is not supported")
        tokens = file.field("tokenizer.ggml.tokens")
        special = {
            f"{name}_token": tokens[number]
            for name, key in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("unk", "unknown"),
                ("pad", "padding"),
            )
            if (number := file.field(f"tokenizer.ggml.{key}_token_id")) is not None
        }
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=file.field("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            model_max_length=file.config.max_position_embeddings,
            **special,
        )


@contextlib.contextmanager
def _read_from(source: str) -> Iterator[None]:
    """Other packages' errors, which they raise of every kind for damaged files, as QloraError."""
    try:
        yield
    except QloraError:
        raise
    except Exception as error:
        raise QloraError(f"{source}: the tokenizer cannot be read ({reason(error)})") from error


def _byte_level(file: GGUFFile) -> Any:
    """Byte-level BPE, as GPT-2 introduced it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(m.split(" ")) for m in file.field("tokenizer.ggml.merges", [])]
    pre = file.field("tokenizer.ggml.pre", "default")
    tokenizer = Tokenizer(models.BPE(_vocabulary(file), merges, ignore_merges=pre in WHOLE_WORDS))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in ("default", "gpt-2"):
        steps: list[Any] = [words_of]
    elif pre in ("smollm", "starcoder", "refact"):
        steps = [pre_tokenizers.Digits(individual_digits=True), words_of]
    elif pre in SPLITS:
        steps = [pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated"), bytes_of]
    else:
        raise QloraError(
            f"{file.source}: text is cut for this tokenizer by {pre!r}, not known here"
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # which the format has no entry for
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, file)
    return _with_bos(tokenizer, file, default=pre in WHOLE_WORDS)


def _sentence_piece(file: GGUFFile) -> Any:
    """SentencePiece's BPE (Llama 1 and 2, Mistral): of all merges the one of best score is done."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = _vocabulary(file)
    scores = dict(zip(vocabulary, file.field("tokenizer.ggml.scores"), strict=True))
    unknown = file.field("tokenizer.ggml.tokens")[file.field("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            sentence_piece_merges(vocabulary, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    strip: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.field("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        strip.append(decoders.Strip(content=" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(strip)
    _add_special(tokenizer, file)
    return _with_bos(tokenizer, file, default=True)


def sentence_piece_merges(
    vocabulary: Mapping[str, int], scores: Mapping[str, float]
) -> list[tuple[str, str]]:
    """The merges, first to last, that do what scores say: every way to put a token together."""
    merges = []
    # A part is as long as some token: a file may have one token of a million characters.
    lengths = {len(token) for token in vocabulary}
    for token in vocabulary:
        cuts = [i for i in range(1, len(token)) if i in lengths and len(token) - i in lengths]
        halves = [
            (token[:i], token[i:])
            for i in cuts
            if token[:i] in vocabulary and token[i:] in vocabulary
        ]
        halves.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(scores[token], pair) for pair in halves]
    merges.sort(key=lambda entry: -entry[0])
    return [pair for _, pair in merges]


def _vocabulary(file: GGUFFile) -> dict[str, int]:
    return {token: number for number, token in enumerate(file.field("tokenizer.ggml.tokens"))}


def _add_special(tokenizer: Any, file: GGUFFile) -> None:
    from tokenizers import AddedToken

    tokens = file.field("tokenizer.ggml.tokens")
    types = file.field("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, types, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            added = AddedToken(token, normalized=False, special=kind == CONTROL)
            tokenizer.add_special_tokens([added]) if kind == CONTROL else tokenizer.add_tokens(
                [added]
            )


def _with_bos(tokenizer: Any, file: GGUFFile, *, default: bool) -> Any:
    """The tokenizer, beginning every text with its first token where the model expects that."""
    from tokenizers import processors

    number = file.field("tokenizer.ggml.bos_token_id")
    if number is not None and file.field("tokenizer.ggml.add_bos_token", default):
        token = file.field("tokenizer.ggml.tokens")[number]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
        )
    return tokenizer
