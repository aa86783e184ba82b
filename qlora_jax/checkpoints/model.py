"""Model: a configuration, a parameter tree, a tokenizer, and the functions that go with them."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
from qlora_jax.lift import lift, tracing
from qlora_jax.lora.array import all_dense
from qlora_jax.models import Cache, DecoderConfig, apply_head, apply_hidden
from qlora_jax.models.loss import causal_lm_loss, need_labels
from qlora_jax.models.padding import to_the_right
from qlora_jax.models.remat import Remat
from qlora_jax.models.split import Split, split_over
from qlora_jax.quant.policy import batch_parts, placement_of

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """A language model as `load` returns it.

    config     the architecture
    params     nested dict of arrays; QuantizedArray where a weight is in 4 bits
    tokenizer  transformers' fast tokenizer, or None if the checkpoint has none
    source     where it came from
    dtype      of the computation; norms, softmax and the loss are fp32 throughout

    The functions take the parameters as an argument: `params`, or what `lora.attach` makes of them.
    All are pure and can be jit-compiled and differentiated.
    """

    task_type: ClassVar[str] = "CAUSAL_LM"
    """PEFT's name for what the model does."""

    config: DecoderConfig
    params: Any
    tokenizer: Any
    source: str
    dtype: DTypeLike

    def apply(
        self,
        params: Any,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        remat: Remat = "none",
    ) -> tuple[jax.Array, Cache | None]:
        """Logits, fp32 [B, T, V], of input_ids [B, T], and the extended cache (None without one).

        attention_mask [B, T]: zero on padding, on either side; segment_ids [B, T]: documents packed
        in a row, which do not see each other; positions [B, T]: counted from these if None;
        cache: of `new_cache`; remat: what the gradient keeps of each layer
        (see `models.remat.RematPolicy`).
        """
        hidden, cache = self.hidden(
            params,
            input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            positions=positions,
            cache=cache,
            remat=remat,
        )
        return self.head(params, hidden), cache

    def hidden(
        self,
        params: Any,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        remat: Remat = "none",
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states [B, T, D] after the final norm, and the cache; arguments as for `apply`."""
        hidden, cache, _ = self._run(
            params,
            input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            positions=positions,
            cache=cache,
            remat=remat,
        )
        return hidden, cache

    def _run(
        self, params: Any, input_ids: jax.Array, *, remat: Remat = "none", **inputs: Any
    ) -> tuple[jax.Array, Cache | None, jax.Array | None]:
        """As `models.apply_hidden`."""
        how = {"dtype": self.dtype, "remat": remat, "dense": all_dense(params) and not tracing()}
        run = functools.partial(apply_hidden, self.config, **how)
        with split_over(_split(params)):
            return lift(run, strict=True)(params, input_ids, **inputs)

    def head(self, params: Any, hidden: jax.Array) -> jax.Array:
        """Logits, fp32 [..., V], of hidden states [..., D]."""
        return self._head(params, hidden)

    def _head(self, params: Any, hidden: jax.Array, *, dense: bool = False) -> jax.Array:
        """As `models.apply_head`."""
        head = functools.partial(apply_head, self.config, dtype=self.dtype, dense=dense)
        return lift(head, strict=True)(params, hidden)

    def loss(
        self, params: Any, batch: Batch, *, remat: Remat = "none"
    ) -> tuple[jax.Array, jax.Array]:
        """(sum of the token losses, number of labelled tokens), what `make_train_step` wants.

        batch: input_ids [B, T], labels [B, T] (not shifted; -100: ignored), and, where they apply,
        attention_mask (zero on padding, on either side) and segment_ids [B, T].

        A mixture of experts whose config.json says output_router_logits learns to balance them too.
        Its load-balancing loss is added once for every labelled token, so that the mean is what
        transformers calls the loss; of several micro-batches each counts by its labelled tokens.
        Padding by attention_mask has no part in the balance.

        Raises QloraError for a batch that lacks one of the first two, whose input_ids are not
        integers [B, T], or that has position_ids.
        """
        _check(batch)
        ids, labels, segments = batch["input_ids"], batch["labels"], batch.get("segment_ids")
        mask = batch.get("attention_mask")
        if mask is not None:
            ids, labels, segments, mask = to_the_right(mask, (ids, labels, segments, mask))
        hidden, _, extra = self._run(
            params,
            ids,
            attention_mask=mask if self.config.padding_matters else None,
            segment_ids=segments,
            remat=remat,
        )
        # The loss differentiates the head apart from the rest, which it does not touch.
        own = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        rest = {name: tree for name, tree in params.items() if name != own}

        dense = all_dense(params[own])

        def head(head_params: Any, rows: jax.Array) -> jax.Array:
            return self._head({**rest, own: head_params}, rows, dense=dense)

        total, tokens = causal_lm_loss(head, params[own], hidden, labels, parts=batch_parts(params))
        return total if extra is None else total + extra * tokens, tokens

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for generating up to `length` tokens, prompt included."""
        return Cache.create(self.config, batch, length, self.dtype)

    @property
    def context(self) -> int | None:
        """The most tokens that a sequence may have; None: no limit."""
        return self.config.max_position_embeddings

    @property
    def changes_at(self) -> int | None:
        """As the configuration says: the length beyond which earlier keys have to be made anew."""
        return self.config.changes_at

    def start(
        self, params: Any, input_ids: jax.Array, attention_mask: jax.Array, room: int
    ) -> tuple[jax.Array, Cache]:
        """Logits [B, V] of the first token after the prompts [B, T], padded on the left, and a
        cache of them with room for `room` tokens more."""
        batch, time = input_ids.shape
        cache = self.new_cache(batch, time + room)
        return self._next(params, input_ids, attention_mask, cache)

    def extend(self, params: Any, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits [B, V] of what comes after `token` [B], and the extended cache."""
        return self._next(params, token[:, None], None, cache)

    def _next(
        self, params: Any, ids: jax.Array, mask: jax.Array | None, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        hidden, after = self.hidden(params, ids, attention_mask=mask, cache=cache)
        assert after is not None
        return self.head(params, hidden[:, -1]), after

    def __repr__(self) -> str:
        return describe(self, str(self.config.num_hidden_layers))


def _check(batch: Batch) -> None:
    """Raises QloraError for a batch of which `Model.loss` would make something else than meant."""
    need_labels(batch)
    ids = batch["input_ids"]
    if not isinstance(ids, jax.Array | np.ndarray):
        raise QloraError(f"input_ids must be an array of integers [B, T], not {type(ids).__name__}")
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise QloraError(f"input_ids must be integers [B, T], not {ids.dtype} {ids.shape}")


def describe(model: Any, layers: str) -> str:
    """One line for `repr`; layers: how many there are, in words."""
    leaves = jax.tree.leaves(model.params)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return (
        f"{type(model).__name__}({model.config.model_type}, {layers} layers, "
        f"{size / 1e6:.0f} MB, source={model.source!r})"
    )


def _split(params: Any) -> Split | None:
    """Of activations on the mesh that 4-bit weights lie on."""
    placement = placement_of(params)
    if placement is None:
        return None
    several = [name for name, size in placement.mesh.shape.items() if size > 1]
    heads = tuple(name for name in several if name not in placement.rows)
    return Split(placement.mesh, placement.rows, heads)
