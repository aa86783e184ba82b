"""Generating text: batched, compiled, greedy or sampled, whole or streamed.

Prompts are padded on the left to a few lengths, so that few programs are compiled; keys and values
go into buffers of fixed size. Letters: B batch, T time, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.seq2seq import Seq2SeqModel
from qlora_jax.data import Message
from qlora_jax.data.tokenize import Template, encode_prompt, turn_end
from qlora_jax.errors import QloraError
from qlora_jax.lora.dora import settle

TextModel = Model | Seq2SeqModel
"""What generates: anything with `start` and `extend`."""

STREAM = 4
"""Tokens decoded in one call when streaming: more spread its overhead, fewer come smoother."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many. Raises QloraError for values out of range."""

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
        if not 0 <= self.temperature < math.inf:
            raise QloraError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise QloraError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise QloraError(f"top_p must be in (0, 1], got {self.top_p}")


def generate(
    model: TextModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    params: Any = None,
    stop: Collection[int] | None = None,
    on_tokens: Callable[[np.ndarray], None] | None = None,
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues every prompt until a stop token or `sampling.max_new_tokens`.

    prompts    B sequences of token ids
    params     `model.params` by default, or those with adapters attached
    stop       tokens that end a row; by default the end tokens of the configuration and tokenizer
    on_tokens  called with the new ids, int32 [B, n], as they come; rows that have ended are filled
               up with a stop token
    rows       B numbers that the rows' random draws go by, 0 to B - 1 by default: a row's tokens
               depend on its prompt, its number and the seed, and not on the other rows (but where
               `changes_at` is set, on the length of the longest)

    Returns the new ids of each prompt, without the stop token. Raises QloraError for an empty
    prompt, for what is no prompt, for ids outside the vocabulary, for more tokens than the model's
    context, and for other than B rows.
    """
    if not len(prompts):
        return []
    sampling, ends = sampling or Sampling(), _end_tokens(model, stop)
    room = _bucket(sampling.max_new_tokens) if on_tokens is None else STREAM
    pieces = []
    for piece in _pieces(model, prompts, sampling, params, ends, room, rows):
        pieces.append(piece)
        if on_tokens is not None:
            on_tokens(piece)
    return [_until_end(row, ends) for row in np.concatenate(pieces, axis=1)]


def stream(
    model: TextModel, prompt: Sequence[int], sampling: Sampling | None = None, *, params: Any = None
) -> Iterator[str]:
    """The continuation of one prompt as text, piece by piece, never half a character.

    Arguments and errors as for `generate`; QloraError also if the model has no tokenizer.
    """
    tokenizer, ends = _tokenizer_of(model), _end_tokens(model)
    ids: list[int] = []
    text, shown = "", 0
    for (row,) in _pieces(model, [prompt], sampling or Sampling(), params, ends, STREAM):
        ids += _until_end(row, ends)
        text = _decode(tokenizer, ids)
        # A character that is not complete yet decodes to the replacement character.
        whole = len(text.rstrip("\ufffd"))
        if whole > shown:
            yield text[shown:whole]
            shown = whole
    if len(text) > shown:
        yield text[shown:]


def complete(
    model: TextModel,
    conversations: Sequence[Sequence[Message]],
    sampling: Sampling | None = None,
    *,
    params: Any = None,
    batch_size: int = 16,
    template: Template = "auto",
) -> list[str]:
    """The model's answer to each conversation, in order, computed `batch_size` at a time.

    An answer depends on its conversation, the place of that in the list and the seed. template: as
    for `data.tokenize`. Errors as for `stream`, before anything is generated.
    """
    if batch_size < 1:
        raise QloraError(f"batch_size must be at least 1, got {batch_size}")
    tokenizer, sampling = _tokenizer_of(model), sampling or Sampling()
    prompts = [prompt_ids(model, messages, template) for messages in conversations]
    _check(model, prompts, sampling)
    # Prompts of like length together save padding; with the longest first, memory that does not
    # suffice shows at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        # The last batch is filled up, so that it needs no program of its own.
        filled = chosen + chosen[-1:] * (min(batch_size, len(order)) - len(chosen))
        new = generate(model, [prompts[i] for i in filled], sampling, params=params, rows=filled)
        for i, ids in zip(chosen, new, strict=False):
            answers[i] = _decode(tokenizer, ids)
    return answers


def prompt_ids(
    model: TextModel, messages: Sequence[Message], template: Template = "auto"
) -> list[int]:
    """What `generate` continues, or for an encoder-decoder answers: that ends with an end token.

    Raises QloraError if the model has no tokenizer.
    """
    tokenizer = _tokenizer_of(model)
    ids = encode_prompt(tokenizer, messages, template)
    if isinstance(model, Seq2SeqModel) and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids


def choose(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """The next token of every row, int32 [B], from logits fp32 [B, V] and a random key a row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    ranked, ids = rank(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    place = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]


def rank(logits: jax.Array, top_k: int | None, top_p: float) -> tuple[jax.Array, jax.Array]:
    """The `top_k` best logits of every row, best first, and their tokens: [B, k] each.

    Those outside the nucleus (arXiv:1904.09751), the fewest best tokens whose probabilities (among
    these k) sum to `top_p`, are -inf; the best token is always inside. Equal logits rank by token.
    """
    size = logits.shape[-1]
    if top_k is None and top_p == 1:
        return logits, jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), logits.shape)
    ranked, ids = jax.lax.top_k(logits, size if top_k is None else min(top_k, size))
    if top_p < 1:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    return ranked, ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Between two steps: the last token of each row, which the cache lacks yet, int32 [B]; whether
    the row has ended, bool [B]; the number of steps made, int32 []; the row's random key [B].
    """

    cache: Any
    token: jax.Array
    done: jax.Array
    count: jax.Array
    keys: jax.Array


@functools.lru_cache(maxsize=16)
def _programs(model: TextModel, sampling: Sampling, ends: tuple[int, ...]) -> tuple[Any, Any]:
    """(start, decode), compiled once for a model without its parameters."""
    fill = ends[0] if ends else 0

    def chosen(
        logits: jax.Array, cache: Any, done: jax.Array, count: jax.Array, keys: jax.Array
    ) -> _State:
        draws = jax.vmap(jax.random.fold_in, (0, None))(keys, count)
        token = jnp.where(done, fill, choose(logits, sampling, draws))
        done = done | jnp.isin(token, jnp.asarray(ends, jnp.int32))
        return _State(cache, token, done, count + 1, keys)

    @functools.partial(jax.jit, static_argnums=6)
    def start(
        params: Any,
        ids: jax.Array,
        mask: jax.Array,
        done: jax.Array,
        count: jax.Array,
        keys: jax.Array,
        room: int,
    ) -> _State:
        """Reads the prompts [B, T], of which `count` tokens are generated, and chooses the next."""
        logits, cache = model.start(params, ids, mask, room)
        return chosen(logits, cache, done, count, keys)

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
    def decode(params: Any, state: _State, count: int, room: int) -> tuple[_State, jax.Array]:
        """Up to `count` tokens more, ids [B, room]; fewer if all rows end before."""

        def go_on(carry: Any) -> jax.Array:
            i, state, _ = carry
            return (i < count) & ~jnp.all(state.done)

        def body(carry: Any) -> Any:
            i, state, out = carry
            logits, cache = model.extend(params, state.token, state.cache)
            state = chosen(logits, cache, state.done, state.count, state.keys)
            return i + 1, state, out.at[:, i].set(state.token)

        out = jnp.full((state.token.shape[0], room), fill, jnp.int32)
        _, state, out = jax.lax.while_loop(go_on, body, (jnp.zeros((), jnp.int32), state, out))
        return state, out

    return start, decode


def _pieces(
    model: TextModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    params: Any,
    ends: tuple[int, ...],
    room: int,
    rows: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """New ids of all prompts, [B, n]: the first one, then up to `room` at a time.

    Where the longest row outgrows `changes_at`, all that there is of the rows is read once more.
    """
    _check(model, prompts, sampling)
    params = settle(model.params if params is None else params)
    # Only what the programs depend on, so that they are shared wherever they can be.
    dtype = jnp.dtype(model.dtype)
    bare = dataclasses.replace(model, params=None, tokenizer=None, source="", dtype=dtype)
    how = dataclasses.replace(sampling, max_new_tokens=1, seed=0)
    start, decode = _programs(bare, how, ends)
    numbers = np.asarray(range(len(prompts)) if rows is None else rows, np.uint32)
    if numbers.shape != (len(prompts),):
        raise QloraError(
            f"rows is {list(numbers.shape)}, but there are {len(prompts)} prompts: give one number "
            "for each"
        )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), numbers)
    texts, left = [list(prompt) for prompt in prompts], sampling.max_new_tokens
    state, done, made = None, np.zeros(len(texts), bool), np.int32(0)
    while left and not np.all(done):
        longest, change = max(map(len, texts)), model.changes_at
        if state is None or longest - 1 == change:
            ids, mask = _pad_left(texts)
            state = start(params, ids, mask, done, made, keys, _bucket(left - 1))
            count, new = 1, np.asarray(state.token)[:, None]
        else:
            count = min(left, room)
            if change is not None and longest <= change:
                count = min(count, change + 1 - longest)
            state, new = decode(params, state, count, room)
            new = np.asarray(new)[:, :count]
        yield new
        texts = [text + row.tolist() for text, row in zip(texts, new, strict=True)]
        left, done, made = left - count, np.asarray(state.done), made + np.int32(count)


def need_text_model(model: Any) -> None:
    """Raises QloraError for a model that cannot generate."""
    if not isinstance(model, TextModel):
        raise QloraError(f"{model!r}: only decoders and encoder-decoders generate text")


def _check(model: TextModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    context, new = model.context, sampling.max_new_tokens
    vocabulary = model.config.vocab_size
    for number, prompt in enumerate(prompts):
        if np.ndim(prompt) != 1:
            raise QloraError(
                f"prompt {number} is no sequence of token ids but has {np.ndim(prompt)} axes; "
                "generate takes a list of prompts, also of a single one, and stream takes one"
            )
        if not len(prompt):
            raise QloraError(f"prompt {number} is empty; generation starts from at least one token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise QloraError(
                f"prompt {number} has ids from {min(prompt)} to {max(prompt)}, the model's "
                f"vocabulary is 0 to {vocabulary - 1}; encode it with the model's own tokenizer"
            )
        if context is not None and len(prompt) + new > context:
            raise QloraError(
                f"the {len(prompt)} tokens of prompt {number} and {new} new ones are more than the "
                f"model's context of {context}; shorten the prompt or lower max_new_tokens"
            )


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask, int32 [B, T], T rounded up."""
    ids = np.zeros((len(prompts), _bucket(max(map(len, prompts)))), np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = prompt
        mask[row, -len(prompt) :] = 1
    return ids, mask


def _bucket(n: int) -> int:
    """n rounded up to a multiple of 64, beyond 512 to an eighth of the next power of two."""
    unit = max(64, (1 << (n - 1).bit_length()) // 8)
    return -(-n // unit) * unit


def _end_tokens(model: TextModel, stop: Collection[int] | None = None) -> tuple[int, ...]:
    need_text_model(model)
    if stop is not None and (isinstance(stop, str) or not isinstance(stop, Iterable)):
        raise QloraError(f"stop is {stop!r}, but must be a collection of token ids, such as [2]")
    ends = set(model.config.eos_token_id if stop is None else stop)
    if stop is None and model.tokenizer is not None:
        ends |= {model.tokenizer.eos_token_id, turn_end(model.tokenizer)} - {None}
    return tuple(sorted(ends))


def _until_end(row: np.ndarray, ends: tuple[int, ...]) -> list[int]:
    stops = np.flatnonzero(np.isin(row, ends))
    return row[: stops[0] if stops.size else len(row)].tolist()


def _tokenizer_of(model: TextModel) -> Any:
    need_text_model(model)
    if model.tokenizer is None:
        raise QloraError(f"{model.source} has no tokenizer; generate from token ids instead")
    return model.tokenizer


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # Cleaning up spaces would change text that a stream has given out.
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
