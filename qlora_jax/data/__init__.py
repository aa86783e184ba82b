"""From rows of text to padded or packed batches of token ids.

examples = read_examples("train.jsonl")                       # rows -> conversations
dataset = tokenize(examples, model.tokenizer, max_length=512) # conversations -> ids and labels
for batch in batches(dataset, 8, seed=0, packing=True):
    ...                                                       # dict of int32 arrays [B, T]

read_pairs and tokenize_pairs are for the formats of instruction data sets, mix for several of them,
tokenize_seq2seq for encoder-decoders, read_labelled and tokenize_labelled for encoders.
"""

from qlora_jax.data.batches import BatchSource, batches, evaluation_batches
from qlora_jax.data.classification import (
    LabelledDataset,
    LabelledText,
    Labels,
    parse_labelled,
    read_labelled,
    tokenize_labelled,
)
from qlora_jax.data.collate import Batch, TokenizedExample
from qlora_jax.data.examples import Example, Message, read_examples, rows_to_examples
from qlora_jax.data.formats import Pair, PairFormat, read_pairs, rows_to_pairs
from qlora_jax.data.order import mix
from qlora_jax.data.reading import read_rows
from qlora_jax.data.seq2seq import Seq2SeqDataset, tokenize_seq2seq
from qlora_jax.data.tokenize import IGNORE, TokenizedDataset, tokenize
from qlora_jax.data.tokenize_pairs import tokenize_pairs

__all__ = [
    "IGNORE",
    "Batch",
    "BatchSource",
    "Example",
    "LabelledDataset",
    "LabelledText",
    "Labels",
    "Message",
    "Pair",
    "PairFormat",
    "Seq2SeqDataset",
    "TokenizedDataset",
    "TokenizedExample",
    "batches",
    "evaluation_batches",
    "mix",
    "parse_labelled",
    "read_examples",
    "read_labelled",
    "read_pairs",
    "read_rows",
    "rows_to_examples",
    "rows_to_pairs",
    "tokenize",
    "tokenize_labelled",
    "tokenize_pairs",
    "tokenize_seq2seq",
]
