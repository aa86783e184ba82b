"""GGUF files, written here by the gguf package as llama.cpp's converter lays them out."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

import qlora_jax as qj
from qlora_jax.checkpoints.gguf import GGUFFile
from qlora_jax.checkpoints.names import parameters
from qlora_jax.models import RopeConfig
from qlora_jax.models.rope import inverse_frequencies
from tests import tiny

pytestmark = pytest.mark.standard_promotion
HEADS, KV_HEADS = 4, 2


def rows_for_rotation(x: np.ndarray, heads: int) -> np.ndarray:
    """The converter's order: the two halves of a head interleaved."""
    return x.reshape(heads, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def write(
    path: Path, folder: Path, *, arch: str = "llama", skip: tuple[str, ...] = (), **more: Any
) -> Path:
    """The checkpoint of tests.tiny as a GGUF file."""
    dense = qj.load(folder)
    stored = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(path, arch)
    config = dense.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    tokens = sorted(dense.tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model(more.pop("model", "gpt2"))
    writer.add_tokenizer_pre(more.pop("pre", "smollm"))
    writer.add_token_list(more.pop("tokens", [token for token, _ in tokens]))
    writer.add_token_types(more.pop("types", [3 if i < 3 else 1 for i in range(len(tokens))]))
    if "scores" in more:
        writer.add_token_scores(more.pop("scores"))
    else:
        writer.add_token_merges(more.pop("merges", []))
    for name, number in {"bos": 0, "eos": 1, "pad": 2, **more.pop("special", {})}.items():
        getattr(writer, f"add_{name}_token_id")(number)
    for key, value in more.items():
        getattr(writer, f"add_{key}")(*value if isinstance(value, tuple) else (value,))
    for parameter in parameters(config):
        for layer in range(parameter.layers):
            name = parameter.gguf_name(layer)
            if name in skip:
                continue
            x = stored[parameter.hf_name(layer)]
            if arch == "llama" and ".attn_q." in name:
                x = rows_for_rotation(x, HEADS)
            if arch == "llama" and ".attn_k." in name:
                x = rows_for_rotation(x, KV_HEADS)
            writer.add_tensor(name, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_the_same_model_as_from_hugging_face(folder, tmp_path):
    model, dense = qj.load(write(tmp_path / "m.gguf", folder)), qj.load(folder)
    assert model.config == dense.config
    for (path, a), (_, b) in zip(
        qj.lora.adapters.named_leaves(model.params).items(),
        qj.lora.adapters.named_leaves(dense.params).items(),
        strict=True,
    ):
        assert (a == b).all(), path
    text = "Pay 1234 euros!"
    assert model.tokenizer(text)["input_ids"] == dense.tokenizer(text)["input_ids"]
    assert model.tokenizer.eos_token == "</s>"


def test_other_architectures_keep_their_rows(folder, tmp_path):
    skip = ()
    with pytest.raises(qj.QloraError, match=r"blk\.0\.attn_q\.bias: missing"):
        qj.load(write(tmp_path / "m.gguf", folder, arch="qwen2", skip=skip))


def test_tensors_that_do_not_fit_are_listed(folder, tmp_path):
    with pytest.raises(qj.QloraError, match=r"blk\.1\.ffn_up\.weight: missing"):
        qj.load(write(tmp_path / "m.gguf", folder, skip=("blk.1.ffn_up.weight",)))


def test_llama_3s_rope_scaling_is_found_out(folder, tmp_path):
    settings = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    # Of 8 frequencies with base 10000 some are kept, some stretched and one is between.
    plain, _ = inverse_frequencies(RopeConfig(theta=10000.0), 16)
    scaled, _ = inverse_frequencies(RopeConfig("llama3", 10000.0, **settings), 16)
    divisors = (plain / scaled).astype(np.float32)
    assert len(set(divisors.round(3).tolist())) > 1
    path = write(tmp_path / "m.gguf", folder, tensor=("rope_freqs.weight", divisors))
    rope = GGUFFile(path).config.rope
    assert (rope.kind, rope.factor) == ("llama3", pytest.approx(32.0, rel=1e-5))
    odd = write(tmp_path / "odd.gguf", folder, tensor=("rope_freqs.weight", divisors[::-1].copy()))
    with pytest.raises(qj.QloraError, match="not Llama 3's rope scaling"):
        GGUFFile(odd)


def test_digits_are_cut_apart_for_smollm_only(folder, tmp_path):
    """With a merge of two digits in the vocabulary, only the pre-tokenizer can keep them apart."""
    tokens = [
        t for t, _ in sorted(qj.load(folder).tokenizer.get_vocab().items(), key=lambda i: i[1])
    ]
    tokens = [*tokens[:-1], "12"]  # in place of a byte that the text does not have
    for pre, expected in (("smollm", ["1", "2"]), ("gpt-2", ["12"]), ("qwen2", ["1", "2"])):
        path = write(tmp_path / f"{pre}.gguf", folder, pre=pre, tokens=tokens, merges=["1 2"])
        assert qj.load(path).tokenizer.tokenize("12") == expected


def test_sentence_piece_takes_the_best_merge_first(folder, tmp_path):
    size = qj.load(folder).config.vocab_size
    words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "bc", "▁a", "abc", "▁abc"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = (words + bytes_ + [f"unused{i}" for i in range(size)])[:size]
    scores = [0.0] * size
    for token, score in {"bc": -1.0, "ab": -2.0, "abc": -3.0, "▁a": -4.0, "▁abc": -5.0}.items():
        scores[tokens.index(token)] = score
    types = [2, 3, 3] + [1] * (len(words) - 3) + [6] * 256 + [1] * size
    path = write(
        tmp_path / "m.gguf",
        folder,
        model="llama",
        pre="default",
        tokens=tokens,
        scores=scores,
        types=types[:size],
        special={"bos": 1, "eos": 2, "unk": 0},
    )
    tokenizer = qj.load(path).tokenizer
    assert tokenizer.tokenize("abc") == ["▁abc"]
    assert tokenizer.tokenize("ab ca") == ["▁", "ab", "▁", "c", "a"]
    ids = tokenizer("abc é")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁abc", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abc é"


def test_faults(folder, tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF, but not really")
    with pytest.raises(qj.QloraError, match="cannot be read as GGUF"):
        qj.load(path)
    with pytest.raises(qj.QloraError, match="architecture 'gpt2' is not supported"):
        qj.load(write(tmp_path / "gpt2.gguf", folder, arch="gpt2"))
    with pytest.raises(qj.QloraError, match="by 'strange', not known here"):
        qj.load(write(tmp_path / "pre.gguf", folder, pre="strange"))
