"""Tensors of every type and shape, where they lie in their file."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qlora_jax as qj
from qlora_jax.checkpoints.safetensors_files import read_header

KINDS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def write(file: Path, header: bytes, data: bytes) -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


def one_tensor(file: Path, about: Any, data: bytes) -> Path:
    return write(file, json.dumps({"x": about}).encode(), data)


@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (0, 4), (2, 1, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read(kind, shape, tmp_path):
    x = np.random.default_rng(0).integers(0, 100, size=shape).astype(KINDS[kind])
    save_file({"x": x, "y": np.ones(3, np.uint8)}, tmp_path / "f", metadata={"a": "b"})
    found = read_header(tmp_path / "f")
    assert found.keys() == {"x", "y"}
    assert (found["x"].kind, found["x"].shape) == (kind, shape)
    read = found["x"].read()
    assert read.dtype == x.dtype
    np.testing.assert_array_equal(read, load_file(tmp_path / "f")["x"])


def test_offsets_need_not_be_aligned(tmp_path):
    x = np.arange(6, dtype=np.float32)
    about = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    header = json.dumps({"x": about, "__metadata__": {"a": "b"}}).encode()
    for spaces in range(8):
        file = write(tmp_path / "f", header + b" " * spaces, x.tobytes())
        np.testing.assert_array_equal(read_header(file)["x"].read(), x.reshape(2, 3))


def test_a_type_that_is_not_read_is_named(tmp_path):
    about = {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}
    stored = read_header(one_tensor(tmp_path / "f", about, bytes(2)))["x"]
    assert stored.kind == "F8_E4M3"
    with pytest.raises(qj.QloraError, match="x has the type F8_E4M3, expected floating-point"):
        stored.read()


def test_more_axes_than_numpy_has(tmp_path):
    for shape, size in (([1] * 70, 4), ([0, 2**62], 0)):
        about = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
        stored = read_header(one_tensor(tmp_path / "f", about, bytes(size)))["x"]
        with pytest.raises(qj.QloraError, match="x cannot be read"):
            stored.read()
