"""Generating text: batched, compiled, greedy or sampled, whole or streamed.

Prompts are padded on the left to a few lengths, so that few programs are compiled; keys and values
go into buffers of fixed size. Letters: B batch, T time, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.model import Model
from qlora_jax.data import Message
from qlora_jax.data.tokenize import Template, encode_prompt
from qlora_jax.errors import QloraError
from qlora_jax.models import Cache

STREAM = 4
"""Tokens decoded in one call when streaming: more spread its overhead, fewer come smoother."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many."""

    max_new_tokens: int = 256
    """Tokens generated at most, the end token included."""
    temperature: float = 0.0
    """Logits are divided by it before sampling; 0 takes the most likely token (greedy)."""
    top_k: int | None = None
    """Sample among the k most likely tokens only."""
    top_p: float = 1.0
    """Sample among the fewest most likely tokens whose probabilities add up to this."""
    seed: int = 0
    """The same seed gives the same text."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise QloraError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise QloraError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise QloraError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise QloraError(f"top_p must be in (0, 1], got {self.top_p}")


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    params: Any = None,
) -> list[list[int]]:
    """Continues every prompt until an end token or `sampling.max_new_tokens`.

    prompts: token ids. params: `model.params` by default, or those with adapters attached.
    Returns the new ids of each prompt, without the end token. A row's tokens do not depend on the
    other rows. Raises QloraError for an empty prompt, and for more tokens than the model's context.
    """
    sampling = sampling or Sampling()
    pieces = list(_pieces(model, prompts, sampling, params, _bucket(sampling.max_new_tokens)))
    ends = _end_tokens(model)
    return [_until_end(row, ends) for row in np.concatenate(pieces, axis=1)]


def stream(
    model: Model,
    prompt: Sequence[int],
    sampling: Sampling | None = None,
    *,
    params: Any = None,
) -> Iterator[str]:
    """The continuation of one prompt as text, piece by piece, never half a character."""
    tokenizer, ends = _tokenizer_of(model), _end_tokens(model)
    ids: list[int] = []
    text = shown = ""
    for (row,) in _pieces(model, [prompt], sampling or Sampling(), params, STREAM):
        ids += _until_end(row, ends)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        # A character that is not complete yet decodes to the replacement character.
        whole = text.rstrip("\ufffd")
        if len(whole) > len(shown):
            yield whole[len(shown) :]
            shown = whole
    if len(text) > len(shown):
        yield text[len(shown) :]


def _pieces(
    model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling, params: Any, size: int
) -> Iterator[np.ndarray]:
    """New ids of all prompts, [B, n] with n at most `size`; rows that have ended are filled up."""
    params = model.params if params is None else params
    ids, mask = _pad_left(prompts, model)
    longest, left = max(map(len, prompts)), sampling.max_new_tokens
    context = model.config.max_position_embeddings
    if longest + left > context:
        raise QloraError(
            f"{longest} tokens of prompt and {left} new ones are more than the model's context of "
            f"{context}; shorten the prompt or lower max_new_tokens"
        )
    start, decode = _programs(_without_params(model), _without_length(sampling), _end_tokens(model))
    cache = model.new_cache(len(prompts), ids.shape[1] + _bucket(left))
    state, finished = start(params, ids, mask, cache), False
    while left and not finished:
        count = min(left, size)
        state, new, finished = decode(params, state, count, size)
        left -= count
        yield np.asarray(new)[:, :count]


def complete(
    model: Model,
    conversations: Sequence[Sequence[Message]],
    sampling: Sampling | None = None,
    *,
    params: Any = None,
    batch_size: int = 16,
    template: Template = "auto",
) -> list[str]:
    """The model's answer to each conversation, in order, `batch_size` at a time."""
    tokenizer = _tokenizer_of(model)
    prompts = [encode_prompt(tokenizer, messages, template) for messages in conversations]
    # Prompts of like length together: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        # The last batch is filled up, so that it needs no program of its own.
        filled = chosen + chosen[-1:] * (min(batch_size, len(order)) - len(chosen))
        new = generate(model, [prompts[i] for i in filled], sampling, params=params)
        for i, ids in zip(chosen, new, strict=False):
            answers[i] = tokenizer.decode(ids, skip_special_tokens=True)
    return answers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Between two tokens: logits fp32 [B, V] of the next, which rows are done [B], the count []."""

    cache: Cache
    logits: jax.Array
    done: jax.Array
    count: jax.Array


@functools.lru_cache(maxsize=16)
def _programs(model: Model, sampling: Sampling, ends: tuple[int, ...]) -> tuple[Any, Any]:
    """(start, decode), compiled once for a model without its parameters."""

    @functools.partial(jax.jit, donate_argnums=3)
    def start(params: Any, ids: jax.Array, mask: jax.Array, cache: Cache) -> _State:
        hidden, cache = model.hidden(params, ids, attention_mask=mask, cache=cache)  # type: ignore[assignment]
        logits = model.head(params, hidden[:, -1])
        done = jnp.zeros(ids.shape[0], bool)
        return _State(cache, logits, done, jnp.zeros((), jnp.int32))

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
    def decode(params: Any, state: _State, count: jax.Array, room: int) -> Any:
        """Up to `count` tokens more -> (state, ids [B, room], whether all rows have ended)."""
        fill = ends[0] if ends else 0
        out = jnp.full((state.done.shape[0], room), fill, jnp.int32)

        def go_on(carry: Any) -> jax.Array:
            i, state, _ = carry
            return (i < count) & ~jnp.all(state.done)

        def body(carry: Any) -> Any:
            i, state, out = carry
            token = jnp.where(state.done, fill, choose(state.logits, sampling, state.count))
            ended = jnp.isin(token, jnp.asarray(ends, jnp.int32)) if ends else False
            hidden, cache = model.hidden(params, token[:, None], cache=state.cache)
            new = _State(
                cache,  # type: ignore[arg-type]
                model.head(params, hidden[:, 0]),
                state.done | ended,
                state.count + 1,
            )
            return i + 1, new, jax.lax.dynamic_update_slice(out, token[:, None], (0, i))

        _, state, out = jax.lax.while_loop(go_on, body, (jnp.zeros((), jnp.int32), state, out))
        return state, out, jnp.all(state.done)

    return start, decode


def choose(logits: jax.Array, sampling: Sampling, step: jax.Array | int) -> jax.Array:
    """The next token of every row, int32 [B], from logits [B, V]; `step` makes it a new draw."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = keep_likely(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    key = jax.random.fold_in(jax.random.key(sampling.seed), step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_likely(logits: jax.Array, top_k: int | None, top_p: float) -> jax.Array:
    """logits [B, V] with -inf on all but the `top_k` best, and of those the nucleus of `top_p`.

    The nucleus (arXiv:1904.09751): the fewest best tokens whose probabilities sum to `top_p`.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1.0:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The best token has nothing before it, so it always stays.
        least = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _pad_left(prompts: Sequence[Sequence[int]], model: Model) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask, int32 [B, T], T rounded up."""
    if not prompts or any(not len(prompt) for prompt in prompts):
        raise QloraError("a prompt is empty: generation needs at least one token to start from")
    length = _bucket(max(map(len, prompts)))
    ids = np.full((len(prompts), length), model.config.pad_token_id or 0, np.int32)
    mask = np.zeros(ids.shape, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def _bucket(n: int) -> int:
    """n rounded up to a multiple of 32, beyond 256 to one of 128."""
    unit = 32 if n <= 256 else 128
    return -(-n // unit) * unit


def _end_tokens(model: Model) -> tuple[int, ...]:
    ends = set(model.config.eos_token_id)
    if model.tokenizer is not None and model.tokenizer.eos_token_id is not None:
        ends.add(model.tokenizer.eos_token_id)
    return tuple(sorted(ends))


def _until_end(row: np.ndarray, ends: tuple[int, ...]) -> list[int]:
    stops = np.flatnonzero(np.isin(row, ends))
    return row[: stops[0] if stops.size else len(row)].tolist()


def _tokenizer_of(model: Model) -> Any:
    if model.tokenizer is None:
        raise QloraError(f"{model.source} has no tokenizer; generate from token ids instead")
    return model.tokenizer


def _without_params(model: Model) -> Model:
    """What the programs depend on; equal for equal models, so that they are shared."""
    return dataclasses.replace(
        model, params=None, tokenizer=None, source="", dtype=np.dtype(model.dtype)
    )


def _without_length(sampling: Sampling) -> Sampling:
    return dataclasses.replace(sampling, max_new_tokens=1)
