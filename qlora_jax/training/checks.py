"""What is refused before a run begins."""

from collections.abc import Sequence

import numpy as np

from qlora_jax.checkpoints.model import Model
from qlora_jax.data import IGNORE, TokenizedExample
from qlora_jax.errors import QloraError


def check_examples(model: Model, examples: Sequence[TokenizedExample]) -> None:
    """Refuses what the model would take and train on wrongly: on the device nothing is checked."""
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for number, example in enumerate(examples):
        ids, labels = example.input_ids, example.labels
        if len(ids) > context:
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
        outside = (labels != IGNORE) & ((labels < 0) | (labels >= vocabulary))
        if np.any(outside):
            raise QloraError(
                f"example {number} has the label {labels[outside][0]}, which is neither a token "
                f"(0 to {vocabulary - 1}) nor {IGNORE} for none"
            )
