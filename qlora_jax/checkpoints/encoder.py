"""EncoderModel: what `load` makes of an encoder."""

import dataclasses
from typing import Any

import jax
from jax.typing import DTypeLike

from qlora_jax.checkpoints.model import Batch, describe
from qlora_jax.errors import QloraError
from qlora_jax.lift import lift
from qlora_jax.lora.array import all_dense
from qlora_jax.models import bind
from qlora_jax.models.classification import classification_loss
from qlora_jax.models.encoder_config import CLASSIFICATION, HEADS, EncoderConfig
from qlora_jax.models.loss import need_labels, token_loss
from qlora_jax.models.remat import Remat
from qlora_jax.quant.policy import batch_parts

_INPUTS = ("attention_mask", "segment_ids", "token_type_ids", "positions")


@dataclasses.dataclass(frozen=True, repr=False)
class EncoderModel:
    """An encoder with its head as `load` returns it; the fields are those of `Model`.

    The functions take the parameters as an argument: `params`, or what `lora.attach` makes of them.
    All are pure and can be jit-compiled and differentiated. There is no dropout but that of the
    adapters. Arguments that they share:

    input_ids       [B, T] int
    attention_mask  [B, T], zero on padding, on either side; None: there is none
    segment_ids     [B, T] int: documents packed in a row, which do not see each other and count
                    their positions from the start. A classification reads each row's first token,
                    so that documents to be classified cannot be packed
    token_type_ids  [B, T] int: first or second of a pair of texts; None: the first
    positions       [B, T] int, from zero on (also of a RoBERTa). None: BERT and DeBERTa count every
                    token of a row, RoBERTa those that are not its padding token
    remat           what the gradient keeps of each layer (see `models.remat.RematPolicy`)
    """

    config: EncoderConfig
    params: Any
    tokenizer: Any
    source: str
    dtype: DTypeLike

    @property
    def task_type(self) -> str | None:
        """PEFT's name for what the model does; it has none for predicting masked words."""
        return "SEQ_CLS" if self.config.head == CLASSIFICATION else None

    def apply(self, params: Any, input_ids: jax.Array, **inputs: Any) -> jax.Array:
        """fp32 logits of the head: of words [B, T, V], or of a row's labels [B, C].

        Raises QloraError for a model without a head.
        """
        self._check_head(inputs.get("segment_ids"))
        return self.head(params, self.hidden(params, input_ids, **inputs))

    def hidden(
        self,
        params: Any,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        remat: Remat = "none",
    ) -> jax.Array:
        """Hidden states [B, T, D] after the last layer.

        Raises QloraError for more tokens in a row than the model has positions.
        """

        def hidden(params: Any, input_ids: jax.Array, inputs: Any) -> jax.Array:
            return bind(self.config, params, self.dtype).hidden(input_ids, **inputs, remat=remat)

        inputs = {
            "attention_mask": attention_mask,
            "segment_ids": segment_ids,
            "token_type_ids": token_type_ids,
            "positions": positions,
        }
        return lift(hidden, strict=True)(params, input_ids, inputs)

    def head(self, params: Any, hidden: jax.Array) -> jax.Array:
        """fp32 logits of hidden states [B, T, D]; words also of some tokens only, [M, D]."""
        return self._head(params, hidden)

    def _head(self, params: Any, hidden: jax.Array, *, dense: bool = False) -> jax.Array:
        """dense: as of `Bert.head`."""

        def head(params: Any, hidden: jax.Array) -> jax.Array:
            return bind(self.config, params, self.dtype).head(hidden, dense=dense)

        return lift(head, strict=True)(params, hidden)

    def loss(
        self, params: Any, batch: Batch, *, remat: Remat = "none"
    ) -> tuple[jax.Array, jax.Array]:
        """(sum of losses, how many they are), what `make_train_step` wants; transformers' mean.

        batch: input_ids, the other inputs where they apply, and labels. Of a masked-lm head they
        are [B, T] (the word that is masked; -100: ignored). Of a classification: classes [B]
        (negative: ignored), numbers [B] or [B, C] if it is a regression, [B, C] if every label is
        true or false by itself.
        """
        need_labels(batch)
        self._check_head(batch.get("segment_ids"))
        inputs = {name: batch.get(name) for name in _INPUTS}
        hidden = self.hidden(params, batch["input_ids"], **inputs, remat=remat)
        if self.config.head == CLASSIFICATION:
            logits = self.head(params, hidden)
            kind = self.config.loss_of(batch["labels"])
            return classification_loss(logits, batch["labels"], kind)
        # The loss differentiates the head apart from the layers, which it does not touch.
        layers = {"encoder": params["encoder"]}
        rest = {name: tree for name, tree in params.items() if name not in layers}
        dense = all_dense(rest["embeddings"])

        def head(head_params: Any, rows: jax.Array) -> jax.Array:
            return self._head({**layers, **head_params}, rows, dense=dense)

        return token_loss(head, rest, hidden, batch["labels"], parts=batch_parts(params))

    def _check_head(self, segment_ids: jax.Array | None) -> None:
        if self.config.head is None:
            raise QloraError(
                f"{self.source}: an encoder without a head has no logits; load it with head= one "
                f"of {', '.join(HEADS)}"
            )
        if self.config.head == CLASSIFICATION and segment_ids is not None:
            raise QloraError(
                "a classification reads each row's first token; give every document its own row"
            )

    def __repr__(self) -> str:
        return describe(self, str(self.config.num_hidden_layers))
