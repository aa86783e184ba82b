"""Seq2SeqModel: what `load` makes of an encoder-decoder."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qlora_jax.checkpoints.model import Batch, describe
from qlora_jax.lift import lift
from qlora_jax.lora.array import all_dense
from qlora_jax.models import EncoderDecoderCache, T5Config, bind
from qlora_jax.models.loss import IGNORE, need_labels, token_loss
from qlora_jax.models.remat import Remat
from qlora_jax.quant.policy import batch_parts


@dataclasses.dataclass(frozen=True, repr=False)
class Seq2SeqModel:
    """An encoder-decoder as `load` returns it; the fields are those of `Model`.

    The functions take the parameters as an argument: `params`, or what `lora.attach` makes of them.
    All are pure and can be jit-compiled and differentiated. Arguments that they share:

    input_ids, attention_mask                  [B, E] of the encoder; the mask is zero on padding
    decoder_input_ids, decoder_attention_mask  [B, T] of the decoder, from its start token on
    segment_ids, decoder_segment_ids           [B, E] and [B, T]: pairs packed in a row, which do
                                               not see each other, by number; both or none
    remat                                      as for `Model.apply`
    """

    task_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    """PEFT's name for what the model does."""

    config: T5Config
    params: Any
    tokenizer: Any
    source: str
    dtype: DTypeLike

    def apply(
        self,
        params: Any,
        input_ids: jax.Array,
        decoder_input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        remat: Remat = "none",
    ) -> jax.Array:
        """Logits, fp32 [B, T, V]: of the token after each of decoder_input_ids."""
        encoder = {"attention_mask": attention_mask, "segment_ids": segment_ids}
        hidden = self.decode(
            params,
            decoder_input_ids,
            self.encode(params, input_ids, **encoder, remat=remat),
            decoder_attention_mask=decoder_attention_mask,
            decoder_segment_ids=decoder_segment_ids,
            remat=remat,
            **encoder,
        )
        return self.head(params, hidden)

    def encode(
        self,
        params: Any,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        remat: Remat = "none",
    ) -> jax.Array:
        """The encoder's hidden states [B, E, D]."""

        def encode(model: Any, ids: jax.Array, masks: Any) -> jax.Array:
            return model.encode(ids, **masks, remat=remat)

        masks = {"attention_mask": attention_mask, "segment_ids": segment_ids}
        return self._run(encode, params, input_ids, masks)

    def decode(
        self,
        params: Any,
        decoder_input_ids: jax.Array,
        encoded: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        remat: Remat = "none",
    ) -> jax.Array:
        """The decoder's hidden states [B, T, D], for `head`; encoded [B, E, D]: of `encode`."""

        def decode(model: Any, ids: jax.Array, encoded: jax.Array, masks: Any) -> jax.Array:
            return model.decode(ids, encoded, **masks, remat=remat)

        masks = {
            "attention_mask": attention_mask,
            "decoder_attention_mask": decoder_attention_mask,
            "segment_ids": segment_ids,
            "decoder_segment_ids": decoder_segment_ids,
        }
        return self._run(decode, params, decoder_input_ids, encoded, masks)

    def head(self, params: Any, hidden: jax.Array) -> jax.Array:
        """Logits, fp32 [..., V], of the decoder's hidden states [..., D]."""
        return self._head(params, hidden)

    def _head(self, params: Any, hidden: jax.Array, *, dense: bool = False) -> jax.Array:
        """dense: as of `T5.head`."""
        return self._run(lambda model, hidden: model.head(hidden, dense=dense), params, hidden)

    def loss(
        self, params: Any, batch: Batch, *, remat: Remat = "none"
    ) -> tuple[jax.Array, jax.Array]:
        """(sum of the token losses, number of labelled tokens), what `make_train_step` wants.

        batch: input_ids [B, E], labels [B, T] (what the decoder is to say; -100: ignored), and,
        where they apply, the masks and segments of `apply`. The decoder's inputs are the labels one
        place further right, each segment after the start token.
        """
        need_labels(batch)
        encoder = {name: batch.get(name) for name in ("attention_mask", "segment_ids")}
        segments = batch.get("decoder_segment_ids")
        hidden = self.decode(
            params,
            self._shifted(batch["labels"], segments),
            self.encode(params, batch["input_ids"], **encoder, remat=remat),
            decoder_attention_mask=batch.get("decoder_attention_mask"),
            decoder_segment_ids=segments,
            remat=remat,
            **encoder,
        )
        # The loss differentiates the head apart from the rest, which it does not touch.
        own = "shared" if self.config.tie_word_embeddings else "lm_head"
        rest = {name: tree for name, tree in params.items() if name != own}
        dense = all_dense(params[own])

        def head(head_params: Any, rows: jax.Array) -> jax.Array:
            return self._head({**rest, own: head_params}, rows, dense=dense)

        return token_loss(head, params[own], hidden, batch["labels"], parts=batch_parts(params))

    @property
    def context(self) -> int | None:
        """The most tokens that a sequence may have: relative positions know no limit."""
        return None

    @property
    def changes_at(self) -> int | None:
        """As of `Model`: keys hold, however many tokens come."""
        return None

    def start(
        self, params: Any, input_ids: jax.Array, attention_mask: jax.Array, room: int
    ) -> tuple[jax.Array, EncoderDecoderCache]:
        """Logits [B, V] of the first token to generate, and a cache for `room` more after it."""

        def start(model: Any, ids: jax.Array, mask: jax.Array) -> Any:
            encoded = model.encode(ids, attention_mask=mask)
            return model.new_cache(encoded, room + 1, attention_mask=mask)

        cache = self._run(start, params, input_ids, attention_mask)
        begin = jnp.full(len(input_ids), self.config.decoder_start_token_id, jnp.int32)
        return self.extend(params, begin, cache)

    def extend(
        self, params: Any, token: jax.Array, cache: EncoderDecoderCache
    ) -> tuple[jax.Array, EncoderDecoderCache]:
        """Logits [B, V] of what comes after `token` [B], and the extended cache."""

        def extend(model: Any, ids: jax.Array, cache: EncoderDecoderCache) -> Any:
            hidden, cache = model.extend(ids, cache)
            return model.head(hidden[:, -1]), cache

        return self._run(extend, params, token[:, None], cache)

    def _run(self, function: Callable[..., Any], params: Any, *arguments: Any) -> Any:
        """function(T5, *arguments), of a T5 with these parameters."""

        def run(params: Any, *arguments: Any) -> Any:
            return function(bind(self.config, params, self.dtype), *arguments)

        return lift(run, strict=True)(params, *arguments)

    def _shifted(self, labels: jax.Array, segments: jax.Array | None) -> jax.Array:
        """labels [B, T] -> what the decoder reads when it is to say them."""
        before = jnp.pad(labels, ((0, 0), (1, 0)))[:, :-1]
        first = jnp.zeros(labels.shape, bool).at[:, 0].set(True)
        if segments is not None:
            first = first.at[:, 1:].set(segments[:, 1:] != segments[:, :-1])
        before = jnp.where(before == IGNORE, self.config.pad_token_id, before)
        return jnp.where(first, self.config.decoder_start_token_id, before)

    def __repr__(self) -> str:
        layers = f"{self.config.num_layers} + {self.config.num_decoder_layers}"
        return describe(self, layers)
