"""4-bit folders as transformers and bitsandbytes write them, made here from their description."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.quant import oracle

DTYPES = {"uint8": np.uint8, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DTYPES["float32"] = np.float32
GOLDENS = Path(__file__).parent / "goldens" / "bitsandbytes.npz"


def pack(
    weight: np.ndarray, codebook: str, block_size: int, *, double_quant: bool, storage: str
) -> dict[str, np.ndarray]:
    """A weight [N, K] as suffix -> tensor; the packed one has none."""
    codes, absmax = oracle.quantize(weight, codebook, block_size)
    packed = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)
    tables = {"nf4": oracle.NF4, "fp4": oracle.LEVELS["fp4"] + np.float32(0)}
    about = {
        "quant_type": codebook,
        "blocksize": block_size,
        "dtype": weight.dtype.name,
        "shape": list(weight.shape),
    }
    tensors = {"": packed.view(DTYPES[storage])[:, None], ".absmax": absmax}
    tensors[".quant_map"] = tables[codebook]
    if double_quant:
        offset = np.mean(absmax)
        with np.load(GOLDENS) as golden:
            levels = golden["dynamic_map"]
        scales, nested = oracle.nearest_scale_codes(absmax, offset, levels)
        tensors |= {".absmax": scales, ".nested_absmax": nested, ".nested_quant_map": levels}
        about |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": float(offset),
        }
    state = np.frombuffer(json.dumps(about).encode(), np.uint8)
    return tensors | {f".quant_state.bitsandbytes__{codebook}": state}


def write(
    folder: Path,
    base: Path,
    *,
    codebook: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    storage: str = "uint8",
    packed: Callable[[str], bool] = lambda name: True,
) -> Path:
    """The checkpoint `base` of tests.tiny, its linear weights in 4 bits where `packed(name)`."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, x in load_file(base / "model.safetensors").items():
        if "_proj." in name and packed(name):
            parts = pack(x, codebook, block_size, double_quant=double_quant, storage=storage)
            tensors |= {name + suffix: part for suffix, part in parts.items()}
        else:
            tensors[name] = x
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": codebook,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_quant_storage": storage,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for file in base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def dense(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The numbers that the packed weight `name` of a file stands for, [N, K] in fp32."""
    (key,) = (key for key in tensors if key.startswith(f"{name}.quant_state."))
    about = json.loads(tensors[key].tobytes())
    size = int(np.prod(about["shape"]))
    codes = oracle.unpack(np.ascontiguousarray(tensors[name]).view(np.uint8), size)
    absmax = tensors[f"{name}.absmax"]
    if "nested_offset" in about:
        nested = np.repeat(tensors[f"{name}.nested_absmax"], 256)[: absmax.size]
        absmax = tensors[f"{name}.nested_quant_map"][absmax] * nested
        absmax = absmax + np.float32(about["nested_offset"])
    flat = oracle.dequantize(codes, absmax, about["quant_type"], about["blocksize"])
    return flat.reshape(about["shape"])
