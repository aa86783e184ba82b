"""Sources and targets to token ids, as QLoRA's own program does it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_jax.data.collate import TokenizedExample
from qlora_jax.data.convert import convert
from qlora_jax.data.formats import Pair
from qlora_jax.data.tokenize import IGNORE, TokenizedDataset, encode, padding_id
from qlora_jax.errors import QloraError


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: Any,
    *,
    source_max_length: int = 1024,
    target_max_length: int = 256,
    train_on_source: bool = False,
    share: bool = False,
) -> TokenizedDataset:
    """BOS and source, then target and EOS, tokenized apart; the target and EOS are labelled.

    tokenizer: a transformers fast tokenizer; a token that it does not have is left out.
    source_max_length and target_max_length: tokens of either part, with its BOS or EOS; what is
    longer is cut on the right. train_on_source: label the source too. share: as of `tokenize`. A
    pair without a target is dropped, as alpaca has some. Raises QloraError for a limit below 1, and
    if no example is left.
    """
    if source_max_length < 1 or target_max_length < 1:
        raise QloraError(
            "source_max_length and target_max_length must be at least 1, "
            f"got {source_max_length} and {target_max_length}"
        )
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def one(pair: Pair) -> tuple[TokenizedExample, bool] | None:
        source = begin + encode(tokenizer, pair.source)
        target = encode(tokenizer, pair.target) + end
        too_long = len(source) > source_max_length or len(target) > target_max_length
        source, target = source[:source_max_length], target[:target_max_length]
        # The first position has no predecessor to be predicted from.
        if not pair.target or len(source) + len(target) < 2:
            return None
        labels = (source if train_on_source else [IGNORE] * len(source)) + target
        ids = np.asarray(source + target, np.int32)
        return TokenizedExample(ids, np.asarray(labels, np.int32), pair.where), too_long

    kept, cut = convert(pairs, one, share)
    if not kept:
        raise QloraError(f"none of {len(pairs)} examples has a target")
    return TokenizedDataset(
        kept,
        padding_id(tokenizer),
        cut,
        len(pairs) - len(kept),
        source_max_length + target_max_length,
    )
