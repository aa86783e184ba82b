"""`qlora-jax convert` on a tiny model: formats there and back, and what is left by a failure."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import qlora_jax as qj
from qlora_jax import cli
from qlora_jax.checkpoints import export
from tests import tiny

pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))


def convert(source: object, dest: object, to: str, *more: object) -> None:
    cli.main(["convert", str(source), str(dest), "--to", to, *map(str, more)])


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a
    )


def equal(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_there_and_back(folder, tmp_path, capsys):
    convert(folder, tmp_path / "dense", "safetensors")
    assert same(tensors(tmp_path / "dense"), tensors(folder))
    convert(folder, tmp_path / "m.gguf", "gguf-f32")
    convert(tmp_path / "m.gguf", tmp_path / "back", "safetensors", "--dtype", "float32")
    assert same(tensors(tmp_path / "back"), tensors(folder))
    before, after = (qj.load(place).tokenizer for place in (folder, tmp_path / "back"))
    assert before("ab c")["input_ids"] == after("ab c")["input_ids"]
    assert "as safetensors in" in capsys.readouterr().out


def test_four_bits_are_kept(folder, tmp_path):
    convert(folder, tmp_path / "one", "bitsandbytes", "--quant-type", "fp4", "--no-double-quant")
    convert(tmp_path / "one", tmp_path / "two", "bitsandbytes")
    assert same(tensors(tmp_path / "one"), tensors(tmp_path / "two"))
    ours = qj.load(folder, quantization=qj.FP4(double_quant=False))
    assert equal(qj.load(tmp_path / "two").params, ours.params)
    convert(tmp_path / "one", tmp_path / "dense", "safetensors")
    export.save_pretrained(tmp_path / "by hand", ours, dtype="float32")
    assert same(tensors(tmp_path / "dense"), tensors(tmp_path / "by hand"))


def test_an_adapter_is_added(folder, tmp_path):
    model = qj.load(folder)
    adapters = qj.lora.init(jax.random.key(0), model.params, qj.LoraConfig(rank=4))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    qj.peft.save(tmp_path / "adapter", adapters, model)
    convert(folder, tmp_path / "merged", "safetensors", "--adapter", tmp_path / "adapter")
    tree = qj.lora.attach(model.params, adapters)
    export.save_pretrained(tmp_path / "by hand", model, tree, dtype="float32")
    merged, by_hand = tensors(tmp_path / "merged"), tensors(tmp_path / "by hand")
    for name, x in by_hand.items():
        np.testing.assert_allclose(merged[name], x, rtol=0, atol=2e-6)
    with pytest.raises(SystemExit) as stop:
        convert(folder, tmp_path / "q", "bitsandbytes", "--adapter", tmp_path / "adapter")
    assert stop.value.code == 2


@pytest.mark.parametrize("to", ["safetensors", "bitsandbytes", "gguf-q8_0"])
def test_what_is_interrupted_leaves_nothing(to, folder, tmp_path, monkeypatch):
    dequantize, calls = export.dense, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return dequantize(*args)

    for module in ("export", "bitsandbytes_export", "gguf_export"):
        monkeypatch.setattr(f"qlora_jax.checkpoints.{module}.dense", interrupted)
    with pytest.raises(SystemExit) as stop:
        convert(folder, tmp_path / "out", to)
    assert stop.value.code == 130
    assert len(calls) == 3 and not list(tmp_path.iterdir())


def test_what_is_refused(folder, tmp_path, capsys):
    for words, message in [
        ((folder, tmp_path, "gguf-f16"), "writes one file, name it"),
        ((folder, folder, "safetensors"), "already there"),
        ((tmp_path / "none", tmp_path / "x", "safetensors"), "none"),
    ]:
        with pytest.raises(SystemExit) as stop:
            convert(*words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_gguf_file_is_not_overwritten(folder, tmp_path, capsys):
    """Its folder is made if need be; the source itself may be named as DEST by mistake."""
    file = tmp_path / "deep" / "m.gguf"
    convert(folder, file, "gguf-f32")
    before = file.read_bytes()
    with pytest.raises(SystemExit) as stop:
        convert(file, file, "gguf-q8_0")
    assert stop.value.code == 2 and file.read_bytes() == before
    assert "m.gguf: already there; choose another name" in capsys.readouterr().err


def test_bitsandbytes_needs_a_weight_that_fits(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        convert(folder, tmp_path / "q", "bitsandbytes", "--block-size", 256)
    assert stop.value.code == 2
    assert "quantize in smaller blocks" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
