"""4-bit block quantization once more, in plain NumPy and in PyTorch's order, for comparison.

Written apart from the library, from the printed constants and by brute force: a weight [N, K] is
flattened, cut into runs of a block, and each element looked up among all levels.
"""

import numpy as np

NF4 = np.asarray(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_FP4_MAGNITUDES = np.asarray([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
LEVELS = {"nf4": NF4, "fp4": np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES])}
# Codes by rising level; FP4's two zeros are 0 and, above it, 8.
ORDER = {"nf4": list(range(16)), "fp4": [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]}


def thresholds(codebook: str) -> np.ndarray:
    """fp32 midpoints between neighbouring levels, ascending [15]."""
    levels = LEVELS[codebook][ORDER[codebook]]
    return np.asarray([(a + b) / np.float32(2) for a, b in zip(levels, levels[1:], strict=False)])


def quantize(weight: np.ndarray, codebook: str, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """weight [N, K] (or any shape) -> (codes uint8 [N*K], absmax fp32 [ceil(N*K/block)])."""
    flat = weight.astype(np.float32).reshape(-1)
    bounds, order = thresholds(codebook), ORDER[codebook]
    codes, scales = [], []
    for start in range(0, flat.size, block_size):
        block = flat[start : start + block_size]
        absmax = np.float32(np.max(np.abs(block)))
        scaled = block * (np.float32(1) / absmax) if absmax else np.zeros_like(block)
        codes += [order[int(np.sum(x > bounds))] for x in scaled]
        scales.append(absmax)
    return np.asarray(codes, np.uint8), np.asarray(scales, np.float32)


def dequantize(codes: np.ndarray, absmax: np.ndarray, codebook: str, block_size: int) -> np.ndarray:
    """codes [n], absmax [ceil(n/block)] -> fp32 [n]."""
    return LEVELS[codebook][codes] * np.repeat(absmax, block_size)[: codes.size]


def unpack(packed: np.ndarray, size: int) -> np.ndarray:
    """bitsandbytes' bytes [ceil(size/2)], even elements in the high nibble -> codes [size]."""
    flat = packed.reshape(-1)
    return np.stack([flat >> 4, flat & 15], axis=1).reshape(-1)[:size]


def dynamic_map() -> np.ndarray:
    """The dynamic 8-bit map in fp64, ascending [256], from its definition."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2**decade + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        levels += [*middles, *-middles]
    return np.sort(np.asarray(levels))


def nearest_scale_codes(
    absmax: np.ndarray, offset: np.float32, table: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """absmax [n] less `offset`, in blocks of 256, to the nearest of `table` [256].

    Returns (codes uint8 [n], nested absmax fp32 [ceil(n/256)]).
    """
    codes, nested = [], []
    for start in range(0, absmax.size, 256):
        block = absmax[start : start + 256] - offset
        top = np.float32(np.max(np.abs(block)))
        scaled = block * (np.float32(1) / top) if top else np.zeros_like(block)
        distance = np.abs(scaled[:, None].astype(np.float64) - table[None, :].astype(np.float64))
        codes.append(np.argmin(distance, axis=1).astype(np.uint8))
        nested.append(top)
    return np.concatenate(codes), np.asarray(nested, np.float32)
