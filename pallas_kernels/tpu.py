"""NF4 matmul on TPU (Pallas, Mosaic): x @ W and g @ W^T, W decoded tile by tile in VMEM.

A weight is laid out as `reference.py` says. Each grid step decodes one tile of W and multiplies a
whole block of rows by it, so that decoding, which the vector unit does while the matrix unit
multiplies, is shared by all of them. For few rows `tpu_few.py` has a step of its own.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_few
from pallas_kernels.tpu_decode import LANES, decode_tile, level_table, zero_beyond


@dataclasses.dataclass(frozen=True)
class Generation:
    """What differs between TPU generations, as far as these kernels care."""

    rows: int  # of x in a grid step: enough to hide the decoding behind the multiplications
    sublanes: bool  # whether a register is gathered from along its sublanes, which is cheaper


# v6e multiplies twice as fast as v5 and decodes no faster, hence the taller block; v4 has 16 MiB
# of VMEM, of which 1024 rows of bf16 take about 9.
GENERATIONS = {4: Generation(1024, False), 5: Generation(1024, True), 6: Generation(4096, True)}
# Of W, along the contraction and along the outputs. The deeper, the seldomer the sum is touched and
# a step started; where the rows of x leave room, tiles are twice as deep.
DEPTH, WIDTH = 1024, 512


def generation() -> int:
    """The generation of the TPU at hand; of a newer one, or without any, the newest known."""
    here = [_number(d) for d in jax.local_devices() if d.platform == "tpu"]
    return min([n for n in here if n in GENERATIONS], default=max(GENERATIONS))


def unavailable() -> str | None:
    """Why these kernels do not run on the TPU at hand; None where they do."""
    tpus = [d for d in jax.local_devices() if d.platform == "tpu"]
    if not tpus:
        return "this process has no TPU"
    old = {d.device_kind for d in tpus if _number(d) < min(GENERATIONS)}
    return f"it needs a TPU v4 or newer, this is a {old.pop()}" if old else None


def _number(device: Any) -> int:
    """The generation in a device's kind: "TPU v5 lite" is 5, "TPU7x" 7."""
    found = re.search(r"\d+", device.device_kind)
    return int(found[0]) if found else max(GENERATIONS)


def nf4_matmul(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    out_dtype: jax.typing.DTypeLike,
    precision: jax.lax.PrecisionLike = None,
    interpret: Any = False,
    target: int | None = None,
) -> jax.Array:
    """x [M, K] (bf16 or fp32) times the 4-bit weight [K, N] -> [M, N], accumulated in fp32.

    packed uint8 [K/2, N], scales fp32 [K/block, N], codebook fp32 [16].
    interpret: as in pallas_call, for machines without a TPU. target: the generation of TPU to
    compile for, when it is not that of this machine.
    """
    target = target or generation()
    return _call(x, packed, scales, codebook, out_dtype, precision, interpret, target, False)


def nf4_matmul_transposed(
    g: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    out_dtype: jax.typing.DTypeLike,
    precision: jax.lax.PrecisionLike = None,
    interpret: Any = False,
    target: int | None = None,
) -> jax.Array:
    """g [M, N] (bf16 or fp32) times the transposed weight -> [M, K], accumulated in fp32."""
    target = target or generation()
    return _call(g, packed, scales, codebook, out_dtype, precision, interpret, target, True)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7, 8), inline=True)
def _call(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    codebook: jax.Array,
    out_dtype: Any,
    precision: Any,
    interpret: Any,
    target: int,
    transposed: bool,
) -> jax.Array:
    m, contracted = x.shape
    k, n = 2 * packed.shape[0], packed.shape[1]
    if contracted != (n if transposed else k):
        raise ValueError(f"x {x.shape} does not fit a weight of {k} x {n}, {transposed=}")
    block = k // scales.shape[0]
    known = GENERATIONS[target]
    few = tpu_few.suits(m, block, x.dtype) and not transposed
    deeper = m * x.dtype.itemsize <= known.rows and block <= WIDTH
    depth = 2 * DEPTH if deeper else DEPTH
    side_k, side_n = (WIDTH, depth) if transposed else (depth, WIDTH)
    tile_n = min(side_n, _up(n, LANES))
    # Whole blocks, so that a tile's bytes hold a contiguous stretch of K.
    tile_k = tpu_few.tile_depth(k, block) if few else min(max(side_k, block), k)
    # A tall tile (of large blocks) leaves room for fewer rows, and so does fp32.
    usual = WIDTH if transposed else DEPTH
    room = known.rows * usual // max(tile_k, usual) * 2 // x.dtype.itemsize
    tile_m = _up(m, 16) if few else min(room, _up(m, 16))
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

    by_eight = tile_k // block % 8 == 0
    steps, ragged = pl.cdiv(contracted, tile_in), contracted % tile_in != 0
    if few:
        table = tpu_few.level_tables(codebook, target)
        add_product = functools.partial(
            tpu_few.add_product, size=k if ragged else None, rows=_up(m, 8), target=target
        )
        # All of x, lest it be fetched again for every column of tiles.
        x_spec = pl.BlockSpec((tile_m, steps * tile_in), lambda i, out, inner: (i, 0))
    else:
        table = level_table(codebook, known.sublanes)
        add_product = functools.partial(
            _add_product, transposed=transposed, size=(k, n), ragged=ragged, precision=precision
        )
        x_spec = pl.BlockSpec((tile_m, tile_in), lambda i, out, inner: (i, inner))
    return pl.pallas_call(
        functools.partial(_accumulate, add_product),
        grid=(pl.cdiv(m, tile_m), pl.cdiv(out_size, tile_out), steps),
        in_specs=[
            x_spec,
            pl.BlockSpec((tile_k // 2, tile_n), of_weight),
            # Three axes, since the last two of a tile must be whole or multiples of 8 x 128.
            pl.BlockSpec((tile_k // block, tile_n), of_weight)
            if by_eight
            else pl.BlockSpec((tile_k // block, 1, tile_n), of_scales),
            pl.BlockSpec(table.shape, lambda i, out, inner: (0, 0)),
        ],
        out_specs=pl.BlockSpec((tile_m, tile_out), lambda i, out, inner: (i, out)),
        out_shape=jax.ShapeDtypeStruct((m, out_size), out_dtype),
        scratch_shapes=[pltpu.VMEM((tile_m, tile_out), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20 if target > 4 else None,
        ),
        interpret=interpret,
        name="nf4_matmul_transposed" if transposed else "nf4_matmul",
    )(x, packed, scales if by_eight else scales[:, None], table)


def _accumulate(add_product: Any, *refs: Any) -> None:
    """A grid step: the sum starts at zero, gains a product, and is written out in the end."""
    *inputs, out_ref, sum_ref = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    add_product(sum_ref, *inputs)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _add_product(
    sum_ref: Any,
    x_ref: Any,
    codes_ref: Any,
    scales_ref: Any,
    table_ref: Any,
    *,
    transposed: bool,
    size: tuple[int, int],
    ragged: bool,
    precision: Any,
) -> None:
    x, scales = x_ref[...], scales_ref[...].reshape(-1, scales_ref.shape[-1])
    if ragged:
        # The last tile reaches beyond the arrays; what lies there may be anything, NaN too.
        axis = 1 if transposed else 0
        left = size[axis] - pl.program_id(2) * x.shape[1]
        x = zero_beyond(x, left, axis=1)
        block = 2 * codes_ref.shape[0] // scales.shape[0]
        scales = zero_beyond(scales, left if transposed else jax.lax.div(left, block), axis=axis)
    w = decode_tile(codes_ref[...], scales, table_ref[...], x.dtype)
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    sum_ref[...] += jax.lax.dot_general(
        x, w, dims, precision=precision, preferred_element_type=jnp.float32
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
