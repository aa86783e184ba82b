"""Generation: against a loop without a cache, alone and in batches, whole and in pieces."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import NF4, LoraConfig, Model, QloraError, generation, lora, models, quantize_tree
from qlora_jax.checkpoints.load import load
from qlora_jax.data import Message
from qlora_jax.data.tokenize import encode_prompt
from qlora_jax.generation import Sampling, choose, complete, generate, rank, stream
from tests.tiny import write_checkpoint

PROMPTS = [[40, 41, 42], [7, 99, 13, 250, 31, 8, 77], [55]]
GREEDY = Sampling(max_new_tokens=12)
WARM = Sampling(max_new_tokens=12, temperature=1.0, seed=3)
TALKS = [[Message("user", text)] for text in ("Hi", "How are you?", "a", "1 + 1 =", "Why?")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_checkpoint(tmp_path_factory.mktemp("generation") / "tiny"))


def adapted(params: Any) -> Any:
    """The parameters in 4 bits, with adapters that change the output."""
    frozen = quantize_tree(params, NF4())
    adapters = lora.init(jax.random.key(0), frozen, LoraConfig(rank=4))
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), adapters)
    return lora.attach(frozen, moved)


def naive(model: Model, params: Any) -> list[list[int]]:
    """Greedy, with everything computed again for every token.

    Rows are padded on the right, which causal attention does not see, so that it compiles once.
    """
    logits = jax.jit(lambda params, ids: model.apply(params, ids)[0])
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    rows = np.arange(len(PROMPTS))
    ids = np.zeros((len(PROMPTS), max(lengths) + 12), np.int32)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = prompt
    for ends in (lengths + i for i in range(12)):
        ids[rows, ends] = np.argmax(np.asarray(logits(params, ids))[rows, ends - 1], axis=-1)
    return [ids[row, n : n + 12].tolist() for row, n in enumerate(lengths)]


def test_greedy_is_the_loop_without_a_cache(model: Model) -> None:
    assert generate(model, PROMPTS, GREEDY, stop=()) == naive(model, model.params)


def test_greedy_with_4_bits_and_adapters(model: Model) -> None:
    params = adapted(model.params)
    got = generate(model, PROMPTS, GREEDY, params=params, stop=())
    assert got == naive(model, params)
    assert got != generate(model, PROMPTS, GREEDY, stop=())


def test_a_sliding_window_with_padding(model: Model) -> None:
    types = ("sliding_attention",) * model.config.num_hidden_layers
    config = dataclasses.replace(model.config, sliding_window=3, layer_types=types)
    windowed = dataclasses.replace(model, config=config)
    got = generate(windowed, PROMPTS, GREEDY, stop=())
    assert got == naive(windowed, model.params)
    assert got != generate(model, PROMPTS, GREEDY, stop=())


def test_rows_do_not_depend_on_each_other(model: Model) -> None:
    together = generate(model, PROMPTS, WARM)
    alone = [generate(model, [p], WARM, rows=[i])[0] for i, p in enumerate(PROMPTS)]
    assert together == alone


def test_much_padding_changes_nothing(model: Model) -> None:
    long = np.random.default_rng(0).integers(3, 250, 70).tolist()
    together = generate(model, [PROMPTS[0], long], WARM)
    assert together[0] == generate(model, PROMPTS[:1], WARM)[0]


def test_end_tokens_end_a_row(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the configuration and of the tokenizer, where no others are asked for."""
    free = generate(model, PROMPTS, WARM)
    config = dataclasses.replace(model.config, eos_token_id=(free[0][4], free[1][0]))
    other = dataclasses.replace(model, config=config)
    stop = {free[0][4], free[1][0], model.tokenizer.eos_token_id}
    assert set(generation._end_tokens(other)) == stop
    assert set(generation._end_tokens(dataclasses.replace(other, tokenizer=None))) < stop
    assert generation._end_tokens(other, {7}) == (7,)
    turns = model.tokenizer.chat_template.replace("</s>", "<s>")
    with monkeypatch.context() as patch:
        patch.setattr(model.tokenizer, "chat_template", turns)
        assert set(generation._end_tokens(other)) == stop | {model.tokenizer.bos_token_id}
    want = [row[: min([row.index(s) for s in stop if s in row], default=12)] for row in free]
    came: list[np.ndarray] = []
    assert generate(other, PROMPTS, WARM, on_tokens=came.append) == want
    assert len(want[0]) <= 4 and not want[1]
    for row, kept in zip(np.concatenate(came, axis=1), want, strict=True):
        assert row[: len(kept)].tolist() == kept
        assert stop.issuperset(row[len(kept) :].tolist())


def test_every_token_is_a_new_draw(model: Model) -> None:
    nothing = jax.tree.map(jnp.zeros_like, model.params)  # so that all tokens are equally likely
    drawn = generate(model, PROMPTS, WARM, params=nothing)
    assert len({token for row in drawn for token in row}) > 24  # of 36, among 259


@pytest.mark.parametrize("count", (1, 6))
def test_fewer_tokens_are_a_beginning_of_more(model: Model, count: int) -> None:
    few = generate(model, PROMPTS, dataclasses.replace(WARM, max_new_tokens=count))
    assert few == [row[:count] for row in generate(model, PROMPTS, WARM)]


def test_seeds(model: Model) -> None:
    same = [PROMPTS[0]] * 3
    first = generate(model, same, WARM)
    assert first == generate(model, same, WARM)
    assert first[0] != first[1]
    assert first != generate(model, same, dataclasses.replace(WARM, seed=4))


def test_the_most_likely_of_one_is_greedy() -> None:
    logits = jax.random.normal(jax.random.key(0), (5, 50)).at[0].set(0.0)
    keys = jax.random.split(jax.random.key(1), 5)
    one = choose(logits, Sampling(temperature=9.0, top_k=1), keys)
    np.testing.assert_array_equal(one, choose(logits, Sampling(), keys))
    np.testing.assert_array_equal(one, np.argmax(logits, axis=-1))


def nucleus(logits: np.ndarray, top_k: int | None, top_p: float) -> list[int]:
    """Tokens of one row that may be drawn, most likely first, in fp64."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp(logits[order].astype(np.float64))
    mass = np.cumsum(weights / weights.sum())
    return order[: 1 + np.searchsorted(mass, top_p)].tolist()


@pytest.mark.parametrize("top_k", (None, 1, 7, 500))
@pytest.mark.parametrize("top_p", (1e-6, 0.3, 0.9, 1.0))
def test_rank_keeps_the_nucleus(top_k: int | None, top_p: float) -> None:
    logits = 3 * np.random.default_rng(0).normal(size=(6, 53)).astype(np.float32)
    logits[0] = 0  # all equal: as many as it takes, and no more
    ranked, ids = rank(jnp.asarray(logits), top_k, top_p)
    for row, values, tokens in zip(logits, np.asarray(ranked), np.asarray(ids), strict=True):
        kept = tokens[np.isfinite(values)]
        assert set(kept.tolist()) == set(nucleus(row, top_k, top_p))
        np.testing.assert_array_equal(values[np.isfinite(values)], row[kept])


def test_draws_follow_the_distribution() -> None:
    """Frequencies of 4000 draws: within four standard deviations of the probabilities."""
    probabilities = np.array([0.05, 0.5, 0.15, 0.3], np.float32)
    logits = jnp.broadcast_to(2 * jnp.log(probabilities), (4000, 4))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = choose(logits, Sampling(temperature=2.0, top_p=0.9), keys)
    want = np.array([0, 0.5, 0.15, 0.3]) / 0.95
    got = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(got, want, rtol=0, atol=4 * np.sqrt(0.25 / 4000))
    assert got[0] == 0


def test_pieces_join_to_the_whole(model: Model) -> None:
    sampling = dataclasses.replace(WARM, max_new_tokens=41)
    prompt = encode_prompt(model.tokenizer, TALKS[0])
    (whole,) = generate(model, [prompt], sampling)
    came: list[np.ndarray] = []
    assert generate(model, [prompt], sampling, on_tokens=came.append) == [whole]
    assert np.concatenate(came, axis=1)[0, : len(whole)].tolist() == whole
    text = model.tokenizer.decode(whole, skip_special_tokens=True)
    assert "".join(stream(model, prompt, sampling)) == text


def test_a_stream_never_gives_half_a_character(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "naïve — 日本語 🙂 \ufffd!"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"] + [1]
    monkeypatch.setattr(generation, "_pieces", lambda *_: (np.array([[i]]) for i in ids))
    pieces = list(stream(model, [5]))
    assert "".join(pieces) == text
    assert len(pieces) == len(text) - 1  # one by one, but for U+FFFD, which waits for the next

    ids = ids[:-3]  # now the text ends within a character: shown when nothing more can come
    assert list(stream(model, [5]))[-1] == "\ufffd"


def test_a_second_call_compiles_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    hidden = models.apply_hidden

    def counted(*args: Any, **kwargs: Any) -> Any:
        traces.append(1)
        return hidden(*args, **kwargs)

    monkeypatch.setattr("qlora_jax.checkpoints.model.apply_hidden", counted)
    generation._programs.cache_clear()
    complete(model, TALKS, WARM, batch_size=3)
    first = len(traces)
    assert first >= 2
    # Another seed, length, prompt and object: within the same buckets, the same programs.
    other = Model(model.config, model.params, model.tokenizer, "elsewhere", "float32")
    complete(other, TALKS[1:], Sampling(30, temperature=1.0, seed=9), batch_size=3)
    assert len(traces) == first


def test_complete_keeps_the_order(model: Model) -> None:
    prompts = [encode_prompt(model.tokenizer, talk) for talk in TALKS]
    new = generate(model, prompts, WARM)
    want = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
    for batch_size in (3, 16):
        assert complete(model, TALKS, WARM, batch_size=batch_size) == want
    assert complete(model, [], WARM) == []


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_sampling_is_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(QloraError, match=message):
        Sampling(**wrong)


def test_prompts_are_checked(model: Model) -> None:
    assert generate(model, []) == []
    with pytest.raises(QloraError, match="prompt 1 is empty"):
        generate(model, [[5], []])
    with pytest.raises(QloraError, match="500 tokens of prompt 1 and 13 new .* context of 512"):
        generate(model, [[5], [5] * 500], Sampling(max_new_tokens=13))
    with pytest.raises(QloraError, match="prompt 0 has ids from 5 to 259"):
        generate(model, [[5, 259]])
    with pytest.raises(QloraError, match="prompt 0 is no sequence of token ids"):
        generate(model, [1, 2, 5])  # type: ignore[list-item]
    with pytest.raises(QloraError, match="stop is 3, but must be a collection"):
        generate(model, PROMPTS, stop=3)  # type: ignore[arg-type]
    with pytest.raises(QloraError, match="rows is .2., but there are 3 prompts"):
        generate(model, PROMPTS, rows=[0, 1])
    with pytest.raises(QloraError, match="batch_size"):
        complete(model, TALKS, batch_size=0)


def test_an_array_of_prompts_is_a_list_of_them(model: Model) -> None:
    prompts = np.array([[1, 2, 5], [2, 4, 5]])
    expected = generate(model, prompts.tolist(), GREEDY)
    assert generate(model, prompts, GREEDY) == expected  # type: ignore[arg-type]


def test_text_needs_a_tokenizer(model: Model) -> None:
    bare = dataclasses.replace(model, tokenizer=None)
    with pytest.raises(QloraError, match="tokenizer"):
        next(stream(bare, [5]))
    with pytest.raises(QloraError, match="tokenizer"):
        complete(bare, TALKS)
