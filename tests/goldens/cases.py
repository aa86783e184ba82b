"""The weights on which we are compared with bitsandbytes; made here, so only answers are stored.

Everything is integer arithmetic scaled by a power of two, which every machine computes alike.
Weights are in PyTorch's order [N, K] = [out, in].
"""

import dataclasses

import ml_dtypes
import numpy as np

from tests.quant import oracle

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODEBOOKS = ("nf4", "fp4")


@dataclasses.dataclass(frozen=True)
class Case:
    """One weight and how it is quantized; `name` is its key in the golden file."""

    weight: str
    codebook: str
    block_size: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.weight}.{self.codebook}.{self.block_size}.{self.dtype}"


def cases() -> list[Case]:
    """Every case with one scale per block, unquantized."""
    found = [Case("random", c, b) for c in CODEBOOKS for b in BLOCK_SIZES]
    for codebook in CODEBOOKS:
        found += [Case("random", codebook, 64, d) for d in ("float16", "bfloat16")]
        found += [Case("real", codebook, 64, d) for d in DTYPES]
        found += [Case(w, codebook, 64) for w in ("zeros", "outliers", f"ties_{codebook}")]
        # One output: bitsandbytes' last block is then short, and lies where ours does.
        found += [Case(f"tail_{k}", codebook, 64) for k in (1, 33, 65, 100, 190)]
    return found


def weight(name: str, real: np.ndarray) -> np.ndarray:
    """The weight [N, K] in fp32 of that name; `real` are the rows taken from a language model."""
    if name == "real":
        return real
    if name == "random":
        return bell(1, (2, 4096))
    if name.startswith("tail_"):
        return bell(2, (1, int(name.removeprefix("tail_"))))
    if name.startswith("ties_"):
        return ties(name.removeprefix("ties_"))
    if name == "zeros":
        w = bell(3, (4, 256))
        w[1, 64:128] = 0.0
        w[2] = 0.0
        w[3, :64] = -0.0
        return w
    if name == "outliers":
        w = bell(4, (4, 256)) / 64
        w[0, 5], w[1, 70], w[3, 255] = 300.0, -3e4, 1e-20
        return w
    raise ValueError(f"no weight named {name!r}")


def bell(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """A bell curve on [-2, 2): the sum of four hashes of 24 bits in multiples of 2^-24."""
    index = np.arange(np.prod(shape), dtype=np.uint64)
    total = sum(_hash(index * np.uint64(4) + np.uint64(i), seed) for i in range(4))
    values = (np.asarray(total, np.int64) - 2**25) / 2**24
    return values.astype(np.float32).reshape(shape)


def exact_scales(shape: tuple[int, int] = (64, 2048)) -> np.ndarray:
    """Weights whose block maxima have a mean that is exact in fp32 in any order of summation.

    Each element is a product of two small integers over 2^12, the second the same in all of a block
    of 64, so that the maxima differ from block to block.
    """
    index = np.arange(np.prod(shape), dtype=np.uint64)
    element = (_hash(index, 5) >> np.uint64(17)).astype(np.int64) - 64
    per_block = (_hash(index // np.uint64(64), 6) >> np.uint64(18)).astype(np.int64) + 1
    return (element * per_block / 2**12).astype(np.float32).reshape(shape)


def ties(codebook: str) -> np.ndarray:
    """Each threshold, its two neighbours in fp32, and the small numbers around zero, [1, 64 * n].

    Every block holds a one, so that absmax is 1 and the thresholds are met exactly.
    """
    thresholds = oracle.thresholds(codebook)
    below = np.nextafter(thresholds, np.float32(-np.inf))
    above = np.nextafter(thresholds, np.float32(np.inf))
    small = np.asarray([0.0, -0.0, 1e-9, -1e-9, 2e-3, -2e-3], np.float32)
    values = np.concatenate([thresholds, below, above, small]).astype(np.float32)
    values = np.where(np.abs(values) < 1e-30, np.float32(0), values)  # neighbours of 0: denormal
    rows = -(-values.size // 63)
    padded = np.zeros(rows * 63, np.float32)
    padded[: values.size] = values
    blocks = np.concatenate([padded.reshape(rows, 63), np.ones((rows, 1), np.float32)], axis=1)
    return np.concatenate([blocks.reshape(1, -1), -blocks.reshape(1, -1)]).astype(np.float32)


def _hash(index: np.ndarray, seed: int) -> np.ndarray:
    """24 well-mixed bits of each index, uint64 (the finalizer of the splitmix64 generator)."""
    with np.errstate(over="ignore"):
        z = (index + np.uint64(seed << 40)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (z ^ (z >> np.uint64(31))) >> np.uint64(40)
