"""Writes bitsandbytes.npz: what bitsandbytes answers on the weights of cases.py.

    python -m tests.goldens.make_bitsandbytes MODEL.gguf

MODEL.gguf is SmolLM2-135M-Instruct; a few of its rows are the "real" weights. Needs torch,
bitsandbytes and gguf. Made with bitsandbytes 0.50.2 (CPU build).
"""

import sys
from pathlib import Path

import gguf
import numpy as np

from tests.goldens import cases
from tests.parity import peer

FILE = Path(__file__).with_name("bitsandbytes.npz")
REAL = {"blk.0.attn_q.weight": 4, "blk.14.ffn_up.weight": 4, "blk.29.attn_v.weight": 4}


def real_rows(path: str) -> np.ndarray:
    """The first rows of a few weights of SmolLM2, fp32 [12, 576]."""
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    rows = [
        gguf.quants.dequantize(tensors[name].data[:count], tensors[name].tensor_type)
        for name, count in REAL.items()
    ]
    return np.concatenate(rows).astype(np.float32)


def main(path: str) -> None:
    real = real_rows(path)
    arrays = {"real": real}
    for case in cases.cases():
        weight = cases.weight(case.weight, real).astype(cases.DTYPES[case.dtype])
        answer = peer.quantize(weight, case.codebook, case.block_size, double_quant=False)
        arrays |= {f"{case.name}/{key}": answer[key] for key in ("packed", "absmax")}
    nested = peer.quantize(cases.exact_scales(), "nf4", 64, double_quant=True)
    keys = ("absmax", "nested_absmax", "nested_offset")
    arrays |= {f"double_quant/{key}": nested[key] for key in keys}
    arrays["dynamic_map"] = nested["nested_quant_map"]
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE.name}: {len(arrays)} arrays, {FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
