"""NF4 matmul on TPU (Pallas, Mosaic): x @ W and g @ W^T, W decoded tile by tile in VMEM.

A weight is laid out as `reference.py` says. Each grid step decodes one tile of W and multiplies a
whole block of up to 1024 rows by it, so that decoding, which the vector unit does while the matrix
unit multiplies, is shared by all of them. Few rows go another way: see `tpu_rows.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_rows
from pallas_kernels.tpu_decode import decode_tile, lane_table, zero_beyond

# Rows x contraction x output of a step. 1024 rows hide the decoding behind the multiplications;
# the buffers of a step (x and y twice, the sum, codes, scales, the decoded tile) take about 9 MiB
# for bf16, within the 16 MiB that every generation grants a kernel without asking.
ROWS, DEPTH, WIDTH = 1024, 512, 512


def nf4_matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    out_dtype: jax.typing.DTypeLike,
    precision: jax.lax.PrecisionLike = None,
    interpret: Any = False,
) -> jax.Array:
    """x [M, K] (bf16 or fp32) times the 4-bit weight [K, N] -> [M, N], accumulated in fp32.

    packed uint8 [K/2, N], scales fp32 [K/block, N], codebook fp32 [16].
    interpret: as in pallas_call, for machines without a TPU.
    """
    if tpu_rows.takes(x, packed, scales):
        return tpu_rows.nf4_matmul(x, packed, scales, codebook, out_dtype, interpret)
    return _call(x, packed, scales, codebook, out_dtype, precision, interpret, False)


def nf4_matmul_transposed(
    g: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    out_dtype: jax.typing.DTypeLike,
    precision: jax.lax.PrecisionLike = None,
    interpret: Any = False,
) -> jax.Array:
    """g [M, N] (bf16 or fp32) times the transposed weight -> [M, K], accumulated in fp32."""
    return _call(g, packed, scales, codebook, out_dtype, precision, interpret, True)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7), inline=True)
def _call(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    out_dtype: Any,
    precision: Any,
    interpret: Any,
    transposed: bool,
) -> jax.Array:
    m, contracted = x.shape
    k, n = 2 * packed.shape[0], packed.shape[1]
    if contracted != (n if transposed else k):
        raise ValueError(f"x {x.shape} does not fit a weight of {k} x {n}, {transposed=}")
    block = k // scales.shape[0]
    tile_k, tile_n = _depth(k, block), min(WIDTH, _up(n, 128))
    # A deep tile (blocks of 1024 and more) leaves room for fewer rows; fp32 for half of them.
    rows = ROWS * DEPTH // max(tile_k, DEPTH) * 2 // x.dtype.itemsize
    tile_m = min(rows, _up(m, 16))
    # Of W, a step takes the tile (along K, along N); the grid is (rows, outputs, contraction).
    if transposed:
        tile_out, tile_in, out_size = tile_k, tile_n, k
    else:
        tile_out, tile_in, out_size = tile_n, tile_k, n

    def of_weight(i: Any, out: Any, inner: Any) -> tuple[Any, Any]:
        return (out, inner) if transposed else (inner, out)

    def of_scales(i: Any, out: Any, inner: Any) -> tuple[Any, ...]:
        along_k, along_n = of_weight(i, out, inner)
        return along_k, 0, along_n

    return pl.pallas_call(
        functools.partial(
            _kernel,
            transposed=transposed,
            size=(k, n),
            ragged=contracted % tile_in != 0,
            precision=precision,
        ),
        grid=(pl.cdiv(m, tile_m), pl.cdiv(out_size, tile_out), pl.cdiv(contracted, tile_in)),
        in_specs=[
            pl.BlockSpec((tile_m, tile_in), lambda i, out, inner: (i, inner)),
            pl.BlockSpec((tile_k // 2, tile_n), of_weight),
            # Three axes, since the last two of a tile must be whole or multiples of 8 x 128.
            pl.BlockSpec((tile_k // block, 1, tile_n), of_scales)
            if tile_k // block % 8
            else pl.BlockSpec((tile_k // block, tile_n), of_weight),
            pl.BlockSpec((8, 128), lambda i, out, inner: (0, 0)),
        ],
        out_specs=pl.BlockSpec((tile_m, tile_out), lambda i, out, inner: (i, out)),
        out_shape=jax.ShapeDtypeStruct((m, out_size), out_dtype),
        scratch_shapes=[pltpu.VMEM((tile_m, tile_out), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="nf4_matmul_transposed" if transposed else "nf4_matmul",
    )(x, packed, scales[:, None] if tile_k // block % 8 else scales, lane_table(codebook))


def _kernel(
    x_ref: Any,
    codes_ref: Any,
    scales_ref: Any,
    table_ref: Any,
    out_ref: Any,
    sum_ref: Any,
    *,
    transposed: bool,
    size: tuple[int, int],
    ragged: bool,
    precision: Any,
) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    x, scales = x_ref[...], scales_ref[...].reshape(-1, scales_ref.shape[-1])
    if ragged:
        # The last tile reaches beyond the arrays; what lies there may be anything, NaN too.
        axis = 1 if transposed else 0
        left = size[axis] - step * x.shape[1]
        x = zero_beyond(x, left, axis=1)
        block = 2 * codes_ref.shape[0] // scales.shape[0]
        scales = zero_beyond(scales, left if transposed else left // block, axis=axis)
    w = decode_tile(codes_ref[...], scales, table_ref[...], x.dtype)
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    sum_ref[...] += jax.lax.dot_general(
        x, w, dims, precision=precision, preferred_element_type=jnp.float32
    )

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _depth(k: int, block: int) -> int:
    """Rows of W in a tile: whole blocks; all of a small K."""
    return min(max(DEPTH, block), k)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
