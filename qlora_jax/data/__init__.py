"""From rows of text to padded batches of token ids.

examples = read_examples("train.jsonl")                       # rows -> conversations
dataset = tokenize(examples, model.tokenizer, max_length=512) # conversations -> ids and labels
for batch in batches(dataset, 8, seed=0, sequence_length=512):
    ...                                                       # dict of int32 arrays [B, T]
"""

from qlora_jax.data.batches import BatchSource, batches, evaluation_batches
from qlora_jax.data.classification import (
    LabelledDataset,
    LabelledText,
    Labels,
    parse_labelled,
    tokenize_labelled,
)
from qlora_jax.data.collate import Batch, TokenizedExample
from qlora_jax.data.examples import Example, Message, read_examples, rows_to_examples
from qlora_jax.data.order import mix
from qlora_jax.data.seq2seq import Seq2SeqDataset, tokenize_seq2seq
from qlora_jax.data.tokenize import IGNORE, TokenizedDataset, tokenize

__all__ = [
    "IGNORE",
    "Batch",
    "BatchSource",
    "Example",
    "LabelledDataset",
    "LabelledText",
    "Labels",
    "Message",
    "Seq2SeqDataset",
    "TokenizedDataset",
    "TokenizedExample",
    "batches",
    "evaluation_batches",
    "mix",
    "parse_labelled",
    "read_examples",
    "rows_to_examples",
    "tokenize",
    "tokenize_labelled",
    "tokenize_seq2seq",
]
