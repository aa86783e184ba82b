"""GGUF files written: what is read from them again is what the model was, tokenizer included."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import qlora_jax as qj
from qlora_jax.checkpoints import tokenizer as reading
from qlora_jax.checkpoints.gguf import GGUFFile
from qlora_jax.checkpoints.gguf_export import save_gguf
from qlora_jax.checkpoints.model import Model
from qlora_jax.lora.adapters import named_leaves
from qlora_jax.models import init_params, read_config
from tests.tiny import TEMPLATE

pytestmark = pytest.mark.standard_promotion

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama, tied": {"tie_word_embeddings": True},
    "llama 3": {"rope_parameters": LLAMA3, "num_key_value_heads": 4},
    "llama, linear, biases": {
        "rope_parameters": LINEAR,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral, window": {"model_type": "mistral", "sliding_window": 8, "head_dim": 32},
    "qwen2.5, yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
}


def random_model(tokenizer: Any = None, **changes: Any) -> Model:
    """Every number random, none of them at its beginning of zero or one."""
    hf = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    config = read_config(hf | changes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
        jax.eval_shape(lambda: init_params(config, jax.random.key(0))),
    )
    return Model(config, params, tokenizer, "random", jnp.float32)


def assert_same_params(ours: Any, theirs: Any) -> None:
    first, second = named_leaves(ours), named_leaves(theirs)
    assert first.keys() == second.keys()
    for path, x in first.items():
        np.testing.assert_array_equal(np.asarray(x, np.float32), second[path], err_msg=path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_comes_back(variant, tmp_path):
    model = random_model(**VARIANTS[variant])
    save_gguf(tmp_path / "m.gguf", model, kind="f32")
    again = qj.load(tmp_path / "m.gguf")
    assert again.config == model.config
    assert again.tokenizer is None
    assert_same_params(model.params, again.params)


def test_a_mistral_without_a_window_is_a_llama(tmp_path):
    model = random_model(model_type="mistral", sliding_window=None)
    save_gguf(tmp_path / "m.gguf", model, kind="f32")
    config = GGUFFile(tmp_path / "m.gguf").config
    assert config == dataclasses.replace(model.config, model_type="llama")


def rounded(path: str, x: Any, kind: str) -> np.ndarray:
    """A leaf by the rounding of its type, which of Q8_0 the gguf package has."""
    if path.endswith(("/scale", "/bias")):
        return x
    if kind == "q8_0":
        rows = x if path.endswith("/embedding") else np.swapaxes(x, -1, -2)
        q8_0 = gguf.GGMLQuantizationType.Q8_0
        stored = gguf.quants.quantize(np.ascontiguousarray(rows), q8_0)
        again = gguf.quants.dequantize(stored, q8_0).reshape(rows.shape)
        assert 0 < np.abs(again - rows).max() < 0.03
        return again if path.endswith("/embedding") else np.swapaxes(again, -1, -2)
    return np.asarray(x).astype({"f16": np.float16, "bf16": jnp.bfloat16}[kind]).astype(np.float32)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_matrices_are_rounded_once_and_vectors_not_at_all(kind, tmp_path):
    model = random_model(attention_bias=True)
    save_gguf(tmp_path / "m.gguf", model, kind=kind)
    again = named_leaves(qj.load(tmp_path / "m.gguf").params)
    for path, x in named_leaves(model.params).items():
        np.testing.assert_array_equal(rounded(path, x, kind), again[path], err_msg=path)
    wide = {"f16": 1, "bf16": 32, "q8_0": 7}
    assert GGUFFile(tmp_path / "m.gguf").field("general.file_type") == wide[kind]


def test_rows_that_are_no_whole_blocks_stay_in_16_bits(tmp_path):
    model = random_model(intermediate_size=80)
    save_gguf(tmp_path / "m.gguf", model, kind="q8_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert types["blk.1.attn_norm.weight"] == "F32"
    down = qj.load(tmp_path / "m.gguf").params["layers"]["mlp"]["down_proj"]["kernel"]
    half = model.params["layers"]["mlp"]["down_proj"]["kernel"].astype(jnp.float16)
    np.testing.assert_array_equal(half.astype(jnp.float32), down)


def test_4_bit_weights_and_adapters_are_merged_on_the_way(tmp_path):
    dense = random_model()
    only = qj.Policy(include=".*/up_proj/kernel")
    params = qj.quantize_tree(dense.params, qj.NF4(block_size=32), only)
    config = qj.LoraConfig(rank=4, targets=("up_proj",))
    adapters = qj.lora.init(jax.random.key(0), params, config)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    save_gguf(tmp_path / "m.gguf", dense, qj.lora.attach(params, adapters), kind="f32")
    merged = qj.lora.merge(params, adapters)
    again = qj.load(tmp_path / "m.gguf").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), again, merged)


TEXTS = (
    "Pay 1234 euros!",
    "  naïve café\n\n\tdef f(x):",
    "It's 12 o'clock — 中文 😀",
    "<s> a </s>b<tool>",
)


def trained(cutting: list[Any], *, whole_words: bool = False, nfc: bool = False) -> Any:
    """A byte-level tokenizer with merges, special tokens, one added by the user and a template."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre.Sequence(cutting)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["it's 12 1212 euros euros naïve naïve  def def f(x)"] * 9, trainer
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return fast(tokenizer)


def fast(tokenizer: Tokenizer, **more: Any) -> Any:
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **more}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATE, model_max_length=256, **special
    )


WORDS, BYTES = pre.ByteLevel(add_prefix_space=False), pre.ByteLevel(False, use_regex=False)
CUTTINGS = {
    "gpt-2": [WORDS],
    "smollm": [pre.Digits(individual_digits=True), WORDS],
    "llama-bpe": [pre.Split(Regex(reading.SPLITS["llama-bpe"]), "isolated"), BYTES],
    "qwen2": [pre.Split(Regex(reading.SPLITS["qwen2"]), "isolated"), BYTES],
}


def assert_same_tokenizer(ours: Any, theirs: Any) -> None:
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == ours.decode(ids)
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.get_vocab().items() <= theirs.get_vocab().items()
    chat = [{"role": "user", "content": "Hello"}]
    rendered = (t.apply_chat_template(chat, tokenize=False) for t in (ours, theirs))
    assert next(rendered) == next(rendered)


@pytest.mark.parametrize("name", CUTTINGS)
def test_byte_level_tokenizers_come_back(name, tmp_path):
    ours = trained(CUTTINGS[name], whole_words=name in reading.WHOLE_WORDS, nfc=name == "qwen2")
    save_gguf(tmp_path / "m.gguf", random_model(ours))
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.field("tokenizer.ggml.pre") == name
    assert file.field("tokenizer.ggml.add_bos_token") is False
    assert file.field("tokenizer.ggml.tokens")[299] == "[PAD299]"
    assert_same_tokenizer(ours, reading.from_gguf(file))


def test_a_first_token_for_every_text_comes_back(tmp_path):
    ours = trained(CUTTINGS["gpt-2"])
    ours.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    save_gguf(tmp_path / "m.gguf", random_model(ours))
    theirs = qj.load(tmp_path / "m.gguf").tokenizer
    assert theirs("a")["input_ids"][0] == 0
    assert_same_tokenizer(ours, theirs)


def sentence_piece(metaspace: bool) -> Any:
    """As a converter makes it of a SentencePiece model, in either way of writing the spaces."""
    words = ["<unk>", "<s>", "</s>", "<pad>"] + [f"<0x{i:02X}>" for i in range(256)]
    # A piece's merges in a SentencePiece model: all ways to make it, the best pieces first.
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁a", "b"), ("c", "o"), ("ab", "co")]
    words += ["▁", "a", "b", "c", "o"] + list(dict.fromkeys(x + y for x, y in merges))
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces: list[Any] = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    if metaspace:
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in words[:4]])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return fast(tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("metaspace", [False, True])
def test_sentence_piece_tokenizers_come_back(metaspace, tmp_path):
    ours = sentence_piece(metaspace)
    save_gguf(tmp_path / "m.gguf", random_model(ours))
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.field("tokenizer.ggml.model") == "llama"
    types = file.field("tokenizer.ggml.token_type")
    assert types[:5] == [2, 3, 3, 3, 6]
    theirs = reading.from_gguf(file)
    for text in ("ab coab", "abab  aco", "zé a"):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"], text
        assert theirs.decode(theirs(text)["input_ids"]) == ours.decode(ours(text)["input_ids"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8,
             "max_window_layers": 1},
            "qwen2 model with a sliding window",
        ),
        ({"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, "'dynamic' cannot be written"),
        ({"rope_parameters": YARN | {"beta_fast": 16.0}}, "no entries for all settings"),
    ],
)  # fmt: skip
def test_models_that_gguf_cannot_describe(changes, message, tmp_path):
    with pytest.raises(qj.QloraError, match=message):
        save_gguf(tmp_path / "m.gguf", random_model(**changes))
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_gguf_cannot_describe(tmp_path):
    wordlevel = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}))
    for message, tokenizer, size in (
        ("cuts text by a rule", trained([pre.Whitespace(), WORDS]), 300),
        (r"ignore_merges True\)", trained([WORDS], whole_words=True), 300),
        ("type WordLevel cannot be put into GGUF", fast(wordlevel), 300),
        (r"counts up to \d+, the model has 200", trained([WORDS]), 200),
    ):
        with pytest.raises(qj.QloraError, match=message):
            save_gguf(tmp_path / "m.gguf", random_model(tokenizer, vocab_size=size))
    state = json.loads(sentence_piece(False).backend_tokenizer.to_str())
    state["model"]["merges"].remove(["▁a", "b"])
    with pytest.raises(qj.QloraError, match="not those of a SentencePiece model"):
        save_gguf(tmp_path / "m.gguf", random_model(fast(Tokenizer.from_str(json.dumps(state)))))
    state["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(qj.QloraError, match="rewrites text by a rule that GGUF lacks"):
        save_gguf(tmp_path / "m.gguf", random_model(fast(Tokenizer.from_str(json.dumps(state)))))
    assert not list(tmp_path.iterdir())


def test_tokens_that_take_the_spaces_beside_them(tmp_path, caplog):
    ours = trained([WORDS])
    ours.add_tokens([AddedToken("<mask>", lstrip=True)])
    with caplog.at_level(logging.WARNING, "qlora_jax"):
        save_gguf(tmp_path / "m.gguf", random_model(ours))
    assert "token '<mask>' takes the spaces beside it" in caplog.text


def test_weights_that_are_not_finite(tmp_path):
    model = random_model()
    model.params["layers"]["mlp"]["up_proj"]["kernel"] *= 1e6
    with pytest.raises(
        qj.QloraError, match=r"layers\.0\.mlp\.up_proj\.weight: \d+ of 6144 .*float16"
    ):
        save_gguf(tmp_path / "m.gguf", model)
    with pytest.raises(qj.QloraError, match="kind is 'q4_0'; expected one of f32, f16, bf16, q8_0"):
        save_gguf(tmp_path / "m.gguf", model, kind="q4_0")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_replaced_when_all_is_written(tmp_path):
    path = Path(tmp_path / "m.gguf")
    path.write_text("before")
    model = random_model()
    save_gguf(path, model, kind="f32")
    assert_same_params(model.params, qj.load(path).params)
