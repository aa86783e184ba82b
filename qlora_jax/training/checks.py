"""What is refused before a run begins."""

import dataclasses

import numpy as np

from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.checkpoints.encoder import EncoderModel
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.seq2seq import Seq2SeqModel
from qlora_jax.data import IGNORE, LabelledDataset, Seq2SeqDataset, TokenizedDataset
from qlora_jax.data.collate import TokenizedExample
from qlora_jax.errors import QloraError

_DATA = {Model: TokenizedDataset, Seq2SeqModel: Seq2SeqDataset, EncoderModel: LabelledDataset}
_BY = {
    TokenizedDataset: "tokenize",
    Seq2SeqDataset: "tokenize_seq2seq",
    LabelledDataset: "tokenize_labelled",
}


def checked(model: AnyModel, examples: TokenizedDataset) -> TokenizedDataset:
    """The examples, padded with a token that the model knows.

    Refuses what it would take and train on wrongly: on the device nothing is checked.
    """
    wanted = _DATA[type(model)]
    if type(examples) is not wanted:
        raise QloraError(
            f"{model!r} is trained on a {wanted.__name__}, what {_BY[wanted]} makes, not on a "
            f"{type(examples).__name__}"
        )
    # An encoder says itself, when it is traced, that a row is too long for it.
    context = None if isinstance(model, EncoderModel) else model.context
    vocabulary = model.config.vocab_size
    classes = len(model.config.labels) if isinstance(model, EncoderModel) else vocabulary
    for number, example in enumerate(examples):
        ids, labels = example.input_ids, example.labels
        if context is not None and len(ids) > context:
            raise QloraError(
                f"example {number}{_where(example)} has {len(ids)} tokens, more than the model's "
                f"context of {context}; cut examples to it when they are tokenized: by "
                "--max-length, where rows have a source and a target by --source-max-length and "
                "--target-max-length, which add up"
            )
        outside = (ids < 0) | (ids >= vocabulary)
        if np.any(outside):
            raise QloraError(
                f"example {number}{_where(example)} has the token id {ids[outside][0]}, the "
                f"model's vocabulary is 0 to {vocabulary - 1}; tokenize with the model's own "
                "tokenizer"
            )
        if labels.dtype.kind == "f":  # a number to predict
            continue
        outside = (labels != IGNORE) & ((labels < 0) | (labels >= classes))
        if np.any(outside):
            raise QloraError(
                f"example {number}{_where(example)} has the label {labels[outside][0]}, which is "
                f"neither one of 0 to {classes - 1} nor {IGNORE} for none"
            )
    if examples.pad_id < vocabulary:
        return examples
    # A padding token was added to the tokenizer alone, as for Llama's, which has none. Padding is
    # masked, but what an embedding has for a token that it lacks is NaN, and 0 * NaN is too.
    return dataclasses.replace(examples, pad_id=0)


def _where(example: TokenizedExample) -> str:
    return f" ({example.where})" if example.where else ""
