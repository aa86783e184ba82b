"""What is refused before a run begins."""

import numpy as np

from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.checkpoints.encoder import EncoderModel
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.seq2seq import Seq2SeqModel
from qlora_jax.data import IGNORE, LabelledDataset, Seq2SeqDataset, TokenizedDataset
from qlora_jax.errors import QloraError

_DATA = {Model: TokenizedDataset, Seq2SeqModel: Seq2SeqDataset, EncoderModel: LabelledDataset}
_BY = {
    TokenizedDataset: "tokenize",
    Seq2SeqDataset: "tokenize_seq2seq",
    LabelledDataset: "tokenize_labelled",
}


def check_examples(model: AnyModel, examples: TokenizedDataset) -> None:
    """Refuses what the model would take and train on wrongly: on the device nothing is checked."""
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
                f"example {number} has {len(ids)} tokens, more than the model's context of "
                f"{context}; cut examples to it: --max-length {context}, or max_length={context} "
                "in tokenize"
            )
        outside = (ids < 0) | (ids >= vocabulary)
        if np.any(outside):
            raise QloraError(
                f"example {number} has the token id {ids[outside][0]}, the model's vocabulary is "
                f"0 to {vocabulary - 1}; tokenize with the model's own tokenizer"
            )
        if labels.dtype.kind == "f":  # a number to predict
            continue
        outside = (labels != IGNORE) & ((labels < 0) | (labels >= classes))
        if np.any(outside):
            raise QloraError(
                f"example {number} has the label {labels[outside][0]}, which is neither one of "
                f"0 to {classes - 1} nor {IGNORE} for none"
            )
