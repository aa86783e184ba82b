"""The code books of 4-bit and 8-bit block-wise quantization, made from their definitions.

Sources: NF4 is section 3 and appendix E of QLoRA (arXiv:2305.14314); the dynamic 8-bit map is
section 2.1 of 8-bit Optimizers (arXiv:2110.02861); FP4 is the E2M1 table of bitsandbytes.
"""

import functools
from statistics import NormalDist

import numpy as np

# Probability mass that NF4 leaves outside its outermost positive quantile: the mean of
# 1 - 1/(2*15) and 1 - 1/(2*16), as printed in the paper's appendix E to 7 digits.
_NF4_OFFSET = 0.9677083


@functools.cache
def nf4() -> np.ndarray:
    """The 16 NF4 values in ascending order, fp32 [16]: quantiles of N(0, 1) scaled to [-1, 1].

    Eight negative and seven positive levels besides an exact zero, so that the code is
    asymmetric but represents zero without error.
    """

    def quantiles(count: int) -> list[float]:
        probabilities = _linspace32(_NF4_OFFSET, 0.5, count)[:-1]
        return [NormalDist().inv_cdf(float(p)) for p in probabilities]

    values = [*quantiles(9), 0.0, *(-q for q in quantiles(8))]
    levels = np.sort(np.asarray(values, np.float32))
    return _frozen(levels / levels.max())


@functools.cache
def fp4() -> np.ndarray:
    """The 16 FP4 (E2M1) values by code, fp32 [16]: codes 8..15 are the negatives of 0..7."""
    twelfths = np.asarray([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32)
    magnitudes = twelfths / np.float32(12)
    return _frozen(np.concatenate([magnitudes, -magnitudes]))


@functools.cache
def dynamic_8bit(signed: bool = True) -> np.ndarray:
    """The dynamic 8-bit map in ascending order, fp32 [256]; of the signed, index 127 is exactly 0.

    Seven decades, the i-th cut into 2^i intervals (2^(i+1) where no sign takes a bit) whose
    midpoints are the levels: relative precision near one, and range down to 1e-6.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = _linspace32(0.1, 1.0, (2**i if signed else 2 ** (i + 1)) + 1)
        midpoints = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = (np.float32(10.0 ** (i - 6)) * midpoints).tolist()
        levels += scaled + ([-v for v in scaled] if signed else [])
    return _frozen(np.sort(np.asarray(levels, np.float32)))


def midpoints(levels: np.ndarray) -> np.ndarray:
    """fp32 decision thresholds between ascending `levels`: [n] -> [n - 1]."""
    return (levels[1:] + levels[:-1]) / np.float32(2)


def _linspace32(start: float, stop: float, count: int) -> np.ndarray:
    """Evenly spaced fp32 points, stepping in from both ends with an fp32 step and one rounding.

    The tables that checkpoints carry were made this way; any other order of roundings misses
    their last bits.
    """
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    points = np.where(i < count // 2, first + step * i, last - step * (count - 1 - i))
    return points.astype(np.float32)


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array, np.float32)
    array.flags.writeable = False  # cached: every caller sees the same object
    return array
