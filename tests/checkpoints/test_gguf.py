"""GGUF files, written here by the gguf package as llama.cpp's converter lays them out."""

import struct
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import qlora_jax as qj
from qlora_jax.checkpoints.gguf import GGUFFile
from qlora_jax.checkpoints.gguf_header import read_header
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
    path: Path,
    folder: Path,
    *,
    arch: str = "llama",
    skip: tuple[str, ...] = (),
    tensors: dict[str, np.ndarray] | None = None,
    uint32: dict[str, int] | None = None,
    float32: dict[str, float] | None = None,
    **more: Any,
) -> Path:
    """The checkpoint of tests.tiny as a GGUF file; more: what else the writer is to add."""
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
    for key, value in (uint32 or {}).items():
        writer.add_uint32(f"{arch}.{key}", value)
    for key, value in (float32 or {}).items():
        writer.add_float32(f"{arch}.{key}", value)
    for key, value in more.items():
        getattr(writer, f"add_{key}")(*value if isinstance(value, tuple) else (value,))
    for name, x in (tensors or {}).items():
        writer.add_tensor(name, x)
    for parameter in parameters(config):
        for layer in range(parameter.layers):
            name = parameter.gguf_name(layer)
            if name in skip or name in (tensors or {}):
                continue
            x = stored[parameter.hf_name(layer)]
            if arch in ("llama", "smollm3") and ".attn_q." in name:
                x = rows_for_rotation(x, HEADS)
            if arch in ("llama", "smollm3") and ".attn_k." in name:
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


def test_smollm3_is_a_llama_with_layers_that_are_not_rotated(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "tiny", layers=4)
    model, dense = qj.load(write(tmp_path / "m.gguf", folder, arch="smollm3")), qj.load(folder)
    assert (model.config.model_type, model.config.no_rope_layers) == ("smollm3", (1, 1, 1, 0))
    found = qj.lora.adapters.named_leaves(model.params)
    for path, x in qj.lora.adapters.named_leaves(dense.params).items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)


OWN = {
    "qwen2": {"attn_q.bias": 64, "attn_k.bias": 32, "attn_v.bias": 32},
    "qwen3": {"attn_q_norm.weight": 16, "attn_k_norm.weight": 16},
}
"""Tensors of a layer that Llama does not have, and their sizes."""


@pytest.mark.parametrize("arch", OWN)
def test_other_architectures_keep_their_rows(arch, folder, tmp_path):
    rng = np.random.default_rng(0)
    own = {
        f"blk.{layer}.{name}": rng.normal(size=size).astype(np.float32)
        for layer in (0, 1)
        for name, size in OWN[arch].items()
    }
    model = qj.load(write(tmp_path / "m.gguf", folder, arch=arch, tensors=own))
    assert model.config.model_type == arch
    stored = load_file(folder / "model.safetensors")
    attention = model.params["layers"]["self_attn"]
    for layer in (0, 1):
        for module in ("q_proj", "k_proj", "v_proj"):
            kernel = attention[module]["kernel"][layer]
            x = stored[f"model.layers.{layer}.self_attn.{module}.weight"]
            np.testing.assert_array_equal(kernel, x.T)
        for name in OWN[arch]:
            kind, _, leaf = name.removeprefix("attn_").partition(".")
            module, leaf = (f"{kind}_proj", leaf) if leaf == "bias" else (kind, "scale")
            np.testing.assert_array_equal(
                attention[module][leaf][layer], own[f"blk.{layer}.{name}"]
            )


def test_other_architectures_need_their_own_tensors(folder, tmp_path):
    with pytest.raises(qj.QloraError, match=r"blk\.0\.attn_q\.bias: missing"):
        qj.load(write(tmp_path / "m.gguf", folder, arch="qwen2"))


def test_mistrals_window(folder, tmp_path):
    """Mistral is of the architecture llama; Qwen's files do not say which layers have it."""
    dense = qj.load(folder)
    window = {"attention.sliding_window": 4}
    model = qj.load(write(tmp_path / "m.gguf", folder, uint32=window))
    assert (model.config.model_type, model.config.sliding_window) == ("mistral", 4)
    assert model.config.layer_types == ("sliding_attention",) * 2
    ids = jnp.arange(3, 15)[None]
    ours, without = (m.apply(m.params, ids)[0] for m in (model, dense))
    np.testing.assert_allclose(ours[:, :4], without[:, :4], atol=1e-5)
    assert np.abs(ours[:, 4:] - without[:, 4:]).max() > 1e-2
    wide = {"attention.sliding_window": 512}  # as wide as the context: no window at all
    assert GGUFFile(write(tmp_path / "wide.gguf", folder, uint32=wide)).config == dense.config
    with pytest.raises(qj.QloraError, match="a sliding window of 4 is not supported"):
        GGUFFile(write(tmp_path / "qwen.gguf", folder, arch="qwen2", uint32=window))


@pytest.mark.parametrize(
    ("uint32", "float32", "message"),
    [
        ({"rope.dimension_count": 8}, {}, r"rope\.dimension_count is 8, the size of a head 16"),
        ({"attention.value_length": 8}, {}, r"attention\.value_length is 8, the size of a head"),
        ({}, {"rope.scaling.attn_factor": 1.5}, r"not supported: llama\.rope\.scaling\.attn_fac"),
        ({}, {"attention.scale": 0.5}, r"not supported: llama\.attention\.scale = 0\.5"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(uint32, float32, message, folder, tmp_path):
    with pytest.raises(qj.QloraError, match=message):
        GGUFFile(write(tmp_path / "m.gguf", folder, uint32=uint32, float32=float32))


def test_settings_that_say_nothing_new(folder, tmp_path):
    usual = {"rope.dimension_count": 16, "attention.key_length": 16, "attention.value_length": 16}
    model = GGUFFile(write(tmp_path / "m.gguf", folder, uint32=usual))
    assert model.config == qj.load(folder).config


def test_tensors_of_whole_numbers_are_listed(folder, tmp_path):
    path = write(tmp_path / "m.gguf", folder, tensors={"output_norm.weight": np.ones(64, np.int32)})
    with pytest.raises(qj.QloraError, match=r"output_norm\.weight: has the type I32, expected"):
        qj.load(path)


def test_a_damaged_tokenizer(folder, tmp_path):
    with pytest.raises(qj.QloraError, match=r"m\.gguf: the tokenizer cannot be read \(\w+"):
        qj.load(write(tmp_path / "m.gguf", folder, special={"eos": 9999}))


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


def test_a_part_of_a_split_file(folder, tmp_path):
    path = tmp_path / "m-00001-of-00003.gguf"
    write(path, folder, key_value=("split.count", 3, gguf.GGUFValueType.UINT16))
    with pytest.raises(qj.QloraError, match="one of 3 parts of a split file"):
        qj.load(path)
    write(path, folder, key_value=("split.count", "3", gguf.GGUFValueType.STRING))
    with pytest.raises(qj.QloraError, match=r"m-00001-of-00003\.gguf: split\.count"):
        qj.load(path)


def test_all_of_a_file_is_read_as_the_gguf_package_reads_it(folder, tmp_path):
    rng = np.random.default_rng(0)
    path = write(
        tmp_path / "m.gguf",
        folder,
        tensors={
            "blk.0.ffn_up.weight": rng.standard_normal((96, 64)).astype(np.float16),
            "blk.1.ffn_up.weight": rng.standard_normal((96, 64)),
        },
        custom_alignment=64,
        array=("a.matrix", [[1, 2], [3, 4]]),
        key_value=("a.truth", True, gguf.GGUFValueType.BOOL),
        description="eine Größe",
    )
    header, reader = read_header(path), gguf.GGUFReader(path)
    theirs = {key: entry.contents() for key, entry in reader.fields.items() if key[:5] != "GGUF."}
    assert theirs["a.matrix"] == [1, 2, 3, 4]  # it keeps no more of an array than its numbers
    fields = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in header.fields.items()}
    fields["a.matrix"] = [row.tolist() for row in fields["a.matrix"]]
    assert fields == theirs | {"a.matrix": [[1, 2], [3, 4]]}
    assert len(header.tensors) == len(reader.tensors)
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(tensor.shape[::-1].tolist())
        assert (ours.kind, ours.start) == (tensor.tensor_type, tensor.data_offset)


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"ffn_up", b"ffn_ab", r"blk\.0\.ffn_ab\.weight: surplus"),
        (b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight", r"two tensors 'blk\.1\.ffn_up\.weight'"),
        (b"llama.block_count", b"llama.head_counts", r"llama\.block_count is missing"),
        (b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id", "two entries 'tokenizer"),
        (b"blk.0.ffn_up.weight", b"blk.0.ffn_\xff\xff.weight", "the name of a tensor is not UTF-8"),
    ],
)
def test_names_that_are_wrong(old, new, message, folder, tmp_path):
    whole = write(tmp_path / "m.gguf", folder).read_bytes()
    assert len(old) == len(new) and old in whole
    (tmp_path / "m.gguf").write_bytes(whole.replace(old, new, 1))
    with pytest.raises(qj.QloraError, match=message):
        qj.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "kind, message",
    [
        (999, r"'blk\.0\.ffn_up\.weight' has the type 999, which .* does not know"),
        (28, r"blk\.0\.ffn_up\.weight: Dequantization for F64 is not yet implemented"),
        (
            14,
            r"'blk\.0\.ffn_up\.weight': Quantized tensor row size \(64\) is not a multiple of Q6_K",
        ),
    ],
)
def test_types_that_cannot_be_read(kind, message, folder, tmp_path):
    whole = bytearray(write(tmp_path / "m.gguf", folder).read_bytes())
    name = b"blk.0.ffn_up.weight"
    # After the name: how many dimensions, two of them, the type.
    struct.pack_into("<I", whole, whole.index(name) + len(name) + 4 + 2 * 8, kind)
    (tmp_path / "m.gguf").write_bytes(whole)
    with pytest.raises(qj.QloraError, match=message):
        qj.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "offset, form, value, message",
    [
        (0, "<I", 5, r"'blk\.0\.ffn_up\.weight' has 5 dimensions"),
        (4, "<Q", 0, r"'blk\.0\.ffn_up\.weight' has the shape \(128, 0\)"),
        (12, "<Q", 2**63, r"'blk\.0\.ffn_up\.weight' ends at byte \d+ of \d+"),
        (24, "<Q", 2**40, r"'blk\.0\.ffn_up\.weight' ends at byte \d+ of \d+"),
    ],
)
def test_shapes_and_offsets_that_are_wrong(offset, form, value, message, folder, tmp_path):
    whole = bytearray(write(tmp_path / "m.gguf", folder).read_bytes())
    name = b"blk.0.ffn_up.weight"
    struct.pack_into(form, whole, whole.index(name) + len(name) + offset, value)
    (tmp_path / "m.gguf").write_bytes(whole)
    with pytest.raises(qj.QloraError, match=message):
        qj.load(tmp_path / "m.gguf")


def test_a_text_that_is_not_utf8(folder, tmp_path):
    """One that is not asked for does no harm."""
    path = tmp_path / "m.gguf"
    whole = write(path, folder, description="Groesse").read_bytes()
    assert qj.load(path).tokenizer is not None
    path.write_bytes(whole.replace(b"Groesse", b"Gr\xf6\xdfe.."))
    qj.load(path)
    token = struct.pack("<Q", 4) + b"</s>"
    assert token in whole
    path.write_bytes(whole.replace(token, token[:-1] + b"\xff", 1))
    with pytest.raises(qj.QloraError, match=r"the metadata entry tokenizer\.ggml\.tokens is not"):
        qj.load(path)


def test_a_file_that_was_cut(folder, tmp_path):
    path = write(tmp_path / "m.gguf", folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(qj.QloraError, match=r"ends at byte \d+ of \d+\); incomplete download"):
        qj.load(path)


def test_faults(folder, tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF, but not really")
    with pytest.raises(qj.QloraError, match="cannot be read as GGUF"):
        qj.load(path)
    with pytest.raises(qj.QloraError, match="architecture 'gpt2' is not supported"):
        qj.load(write(tmp_path / "gpt2.gguf", folder, arch="gpt2"))
    with pytest.raises(qj.QloraError, match="by 'strange', not known here"):
        qj.load(write(tmp_path / "pre.gguf", folder, pre="strange"))
