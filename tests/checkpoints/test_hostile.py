"""Files that are damaged or made to do harm: one clear error each, or the model that they hold.

Every header is mutated at random. What must never come out is another exception than QloraError, a
hang, memory beyond the file's size, or a file outside the folder.
"""

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import qlora_jax as qj
from qlora_jax.checkpoints.bitsandbytes_export import save_bitsandbytes
from qlora_jax.checkpoints.gguf_header import read_header
from qlora_jax.checkpoints.load import load
from qlora_jax.checkpoints.tensors import SafetensorsFolder
from qlora_jax.checkpoints.tokenizer import sentence_piece_merges
from tests import tiny
from tests.checkpoints.test_gguf import write as write_gguf

pytestmark = pytest.mark.standard_promotion
SLACK = 4 * 2**20
"""Bytes that reading may take beyond a multiple of the file's size."""

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def fuzzed(test: Callable[..., Any]) -> Callable[..., Any]:
    return pytest.mark.slow(SETTINGS(test))


numbers = st.sampled_from(
    [-1, 0, 1, 2, 7, 63, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**30]
)
strange = st.one_of(
    st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=8), st.just([]), st.just({}),
    st.lists(numbers, max_size=4), st.sampled_from(["..", "../x", "/etc/passwd", "a/b", "\x00"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    return tiny.write_checkpoint(root / "tiny", layers=1, hidden=32, intermediate=32)


@pytest.fixture(scope="module")
def gguf_file(folder: Path) -> Path:
    return write_gguf(folder.parent / "whole.gguf", folder, skip=())


def harmless(read: Callable[[], Any], size: int) -> Any:
    """What `read` gives, or the message of its QloraError; anything else is raised."""
    tracemalloc.start()
    try:
        result = read()
    except qj.QloraError as error:
        result = str(error)
        assert result.strip()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 * size + SLACK, f"{peak} bytes for a file of {size}"
    return result


def change_at(content: Any, where: list[int], value: Any) -> Any:
    """JSON with the entry that the numbers lead to replaced, removed or doubled."""
    if not where or not isinstance(content, dict | list) or not content:
        return value
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[where[0] % len(keys)]
    copy: Any = dict(content) if isinstance(content, dict) else list(content)
    if len(where) == 1 and where[0] % 5 == 0:
        del copy[key]
    else:
        copy[key] = change_at(content[key], where[1:], value)
    return copy


paths = st.lists(st.integers(0, 99), min_size=1, max_size=4)


def with_header(whole: bytes, header: bytes) -> bytes:
    (length,) = struct.unpack("<Q", whole[:8])
    return struct.pack("<Q", len(header)) + header + whole[8 + length :]


@fuzzed
@given(where=paths, value=strange)
def test_safetensors_headers(where, value, folder, tmp_path):
    """Wrong types, shapes and offsets in a header that is still JSON."""
    whole = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    about = change_at(json.loads(whole[8 : 8 + length]), where, value)
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(with_header(whole, json.dumps(about).encode()))
    shutil.copy(folder / "config.json", tmp_path)
    harmless(lambda: load(tmp_path), len(whole))


@fuzzed
@given(data=st.data())
def test_safetensors_bytes(data, folder, tmp_path):
    """Bytes exchanged and the file cut, at the start above all."""
    whole = bytearray((folder / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(whole))))
    (tmp_path / "model.safetensors").write_bytes(whole[:cut])
    harmless(lambda: SafetensorsFolder(tmp_path).shapes(), len(whole))


def test_a_name_that_stands_twice(folder, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = whole[8 : 8 + length].strip()
    name = '"model.norm.weight"'
    entry = json.dumps(json.loads(header)["model.norm.weight"])
    twice = header[:-1] + f",{name}:{entry}".encode() + b"}"
    (tmp_path / "model.safetensors").write_bytes(with_header(whole, twice))
    with pytest.raises(qj.QloraError, match="stands in it twice"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("kind", ["F32", {"F32": None}], ids=["text", "object"])
@pytest.mark.parametrize("form", [list, dict])
def test_forms_of_a_header_that_its_package_takes_as_well(form, kind, folder, tmp_path):
    """Its parser takes a list for an object, and an object for a name."""
    whole = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    about = json.loads(whole[8 : 8 + length])
    entry = about["model.norm.weight"]
    fields = {key: entry[key] for key in ("dtype", "shape", "data_offsets")} | {"dtype": kind}
    about["model.norm.weight"] = fields if form is dict else list(fields.values())
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(with_header(whole, json.dumps(about).encode()))
    found = harmless(lambda: SafetensorsFolder(tmp_path).shapes(), len(whole))
    if form is list:
        assert "model.norm.weight is" in found
    else:
        assert found["model.norm.weight"] == (32,)


@fuzzed
@given(where=paths, value=strange)
def test_indexes(where, value, folder, tmp_path):
    names = list(SafetensorsFolder(folder).shapes())
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    shutil.copy(folder / "model.safetensors", tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps(change_at(index, where, value))
    )
    harmless(lambda: SafetensorsFolder(tmp_path), (tmp_path / "a.safetensors").stat().st_size)


@pytest.mark.parametrize("name", ["../m.safetensors", "/tmp/m.safetensors", "..", "a/../../m", ""])
def test_an_index_does_not_lead_out(name, folder, tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    shutil.copy(folder / "model.safetensors", tmp_path / "m.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(qj.QloraError, match="refusing"):
        SafetensorsFolder(inside)


@fuzzed
@given(where=paths, value=strange)
def test_configurations(where, value, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(change_at(config, where[:1], value)))
    shutil.copy(folder / "model.safetensors", tmp_path)
    harmless(lambda: load(tmp_path), (tmp_path / "model.safetensors").stat().st_size)


def test_a_number_of_more_digits_than_python_reads(folder, tmp_path):
    config = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (tmp_path / "config.json").write_text(config + ', "odd": ' + "1" * 5000 + "}")
    with pytest.raises(qj.QloraError, match=r"config\.json: not JSON \(Exceeds the limit"):
        load(tmp_path)


@fuzzed
@given(data=st.data())
def test_gguf_bytes(data, gguf_file, tmp_path):
    """Lengths, types and offsets anywhere in the header replaced by strange ones; cut files."""
    whole = bytearray(gguf_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(0, 1200), st.integers(0, 12_000)))
        value = data.draw(numbers) % 2**64
        form = data.draw(st.sampled_from(["<Q", "<I", "<B"]))
        struct.pack_into(form, whole, at, value % 2 ** (8 * struct.calcsize(form)))
    cut = data.draw(st.one_of(st.none(), st.none(), st.integers(0, len(whole))))
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[:cut])
    harmless(lambda: load(path), len(whole))


def test_an_array_longer_than_the_file(gguf_file, tmp_path):
    """The gguf package alone would count to 2^60."""
    whole = bytearray(gguf_file.read_bytes())
    key = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type")
    struct.pack_into("<Q", whole, key + 8, 2**60)
    (tmp_path / "m.gguf").write_bytes(whole)
    with pytest.raises(qj.QloraError, match=f"token_type', an array of {2**60} numbers"):
        qj.load(tmp_path / "m.gguf")


def test_gguf_numbers_and_tokens_take_the_memory_of_the_file(tmp_path):
    """Python's lists would take eight times that of an array of bytes or more, and all parts of a
    token the square of its length."""
    path = tmp_path / "m.gguf"
    count = 4_000_000
    entry = struct.pack("<Q6sIIQ", 6, b"a.list", 9, 0, count) + bytes(count)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    header = harmless(lambda: read_header(path), count // 4)
    assert header.fields["a.list"].shape == (count,)
    vocabulary = {token: i for i, token in enumerate(["a", "a" * 20_000, "aa"])}
    merges = harmless(lambda: sentence_piece_merges(vocabulary, dict.fromkeys(vocabulary, 0.0)), 0)
    assert merges == [("a", "a")]


@pytest.fixture(scope="module")
def four_bits(folder: Path) -> Path:
    path = folder.parent / "bitsandbytes"
    save_bitsandbytes(path, load(folder, quantization=qj.NF4(block_size=32)))
    return path


@fuzzed
@given(where=paths, value=strange)
def test_quant_states(where, value, four_bits, tmp_path):
    """The JSON that says of a packed weight what it was."""
    tensors = load_file(four_bits / "model.safetensors")
    key = next(name for name in tensors if ".quant_state." in name)
    about = json.loads(tensors[key].tobytes())
    text = json.dumps(change_at(about, where[:2], value)).encode()
    save_file(tensors | {key: np.frombuffer(text, np.uint8)}, tmp_path / "model.safetensors")
    shutil.copy(four_bits / "config.json", tmp_path)
    harmless(lambda: load(tmp_path), (four_bits / "model.safetensors").stat().st_size)


@fuzzed
@given(where=paths, value=strange)
def test_quantization_configs(where, value, four_bits, tmp_path):
    config = json.loads((four_bits / "config.json").read_text())
    config["quantization_config"] = change_at(config["quantization_config"], where[:2], value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(four_bits / "model.safetensors", tmp_path)
    harmless(lambda: load(tmp_path), (four_bits / "model.safetensors").stat().st_size)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> tuple[qj.Model, Path]:
    model = load(folder)
    import jax

    config = qj.LoraConfig(rank=2, targets=("q_proj", "up_proj"))
    qj.peft.save(folder.parent / "adapter", qj.lora.init(jax.random.key(0), model.params, config),
                 model, config)  # fmt: skip
    return model, folder.parent / "adapter"


@fuzzed
@given(where=paths, value=strange)
def test_adapter_configurations(where, value, adapter, tmp_path):
    model, folder = adapter
    about = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(change_at(about, where, value)))
    shutil.copy(folder / "adapter_model.safetensors", tmp_path)
    harmless(lambda: qj.peft.load(tmp_path, model), 10_000)


def test_a_tokenizer_runs_no_code(tmp_path, monkeypatch):
    """Not even if whoever is asked by transformers says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tiny.write_checkpoint(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    theirs = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | theirs))
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(qj.QloraError, match="the tokenizer cannot be read"):
        qj.load(folder)
