"""What the library makes of a weight in PyTorch's order, in bitsandbytes' order again."""

import numpy as np

from qlora_jax.quant import QuantConfig, QuantizedArray, bnb, quantize
from tests.quant import oracle


def quantized(
    weight: np.ndarray, codebook: str, block_size: int, double_quant: bool = False
) -> QuantizedArray:
    """weight [N, K] -> our [K, N]."""
    return quantize(weight.T, QuantConfig(codebook, block_size, double_quant))


def codes_and_scales(w: QuantizedArray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N*K] and scales in the order in which bitsandbytes stores them."""
    k, (n,) = w.k_shape[0], w.n_shape
    if k % w.block_size == 0:
        stored = bnb.to_bitsandbytes(w)
        return oracle.unpack(stored["packed"], w.size), stored["absmax"]
    assert n == 1, "only a single output has a short last block where bitsandbytes has one"
    return codes(w)[:, 0], np.asarray(w.scales)[:, 0]


def codes(w: QuantizedArray) -> np.ndarray:
    """Unpacked by the layout as its documentation tells it: [K, N], one weight."""
    packed, half = np.asarray(w.codes), w.block_size // 2
    out = np.empty((2 * packed.shape[0], packed.shape[1]), np.uint8)
    for row in range(packed.shape[0]):
        block, i = divmod(row, half)
        out[block * w.block_size + i] = packed[row] & 15
        out[block * w.block_size + i + half] = packed[row] >> 4
    return out[: w.k_shape[0]]
