"""What `load` returns: a model of one of three kinds."""

from qlora_jax.checkpoints.encoder import EncoderModel
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.seq2seq import Seq2SeqModel

AnyModel = Model | Seq2SeqModel | EncoderModel
