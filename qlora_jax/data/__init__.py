"""From rows of text to padded batches of token ids.

examples = read_examples("train.jsonl")                       # rows -> conversations
dataset = tokenize(examples, model.tokenizer, max_length=512) # conversations -> ids and labels
for batch in batches(dataset, 8, seed=0, sequence_length=512):
    ...                                                       # dict of int32 arrays [B, T]
"""

from qlora_jax.data.batches import BatchSource, batches, evaluation_batches
from qlora_jax.data.collate import Batch
from qlora_jax.data.examples import Example, Message, read_examples, rows_to_examples
from qlora_jax.data.order import mix
from qlora_jax.data.tokenize import IGNORE, TokenizedDataset, TokenizedExample, tokenize

__all__ = [
    "IGNORE",
    "Batch",
    "BatchSource",
    "Example",
    "Message",
    "TokenizedDataset",
    "TokenizedExample",
    "batches",
    "evaluation_batches",
    "mix",
    "read_examples",
    "rows_to_examples",
    "tokenize",
]
