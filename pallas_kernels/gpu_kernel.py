"""The kernel on Hopper GPUs: y^T = W^T x^T, or W x^T, with W decoded tile by tile.

W is the left operand, so that the rows of x, often few, are the side of wgmma that may be short:
it multiplies 64 rows of its left operand by 8 to 256 columns of its right one.

A thread block has three warpgroups. One brings tiles of x, codes and scales into shared memory
(TMA, several steps ahead). The two others decode a tile of W each, leave it in shared memory and,
while the tensor cores multiply it, decode the next one into a second buffer. (For W x^T, where
neighbours in memory are neighbours in the sum, W could go to wgmma from registers; for W^T x^T they
are not, and storing the tile is its transposition. One way serves both.)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_decode import LAYOUT, lookup
from pallas_kernels.gpu_tiles import WARPGROUPS, WIDTH, Tiles

# Registers of a thread that only copies; the others share what it leaves.
_COPYING_REGISTERS = 40


def multiply(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    table: jax.Array,
    out_dtype: Any,
    tiles: Tiles,
    interpret: Any = False,
) -> jax.Array:
    """x [M, K] (tiles.transposed: [M, N]) -> sums of the parts [splits, M, N] (or [.., M, K]).

    packed uint8 [K/2, N], scales fp32 [K/block, N], table fp32 [128] from `lane_table`. TMA wants
    M in eights, K and N in 64s; otherwise they may be ragged: it reads zeros beyond the arrays,
    where a zero scale makes any code a zero, and writes nothing there.
    """
    m, k, n = x.shape[0], 2 * packed.shape[0], packed.shape[1]
    block = k // scales.shape[0]
    outputs = k if tiles.transposed else n
    leaving = min(tiles.m, 64)  # rows of y that go through shared memory at once
    scratch = {
        "y_smem": _shared((WARPGROUPS, leaving, tiles.outputs), out_dtype),
        # Two tiles a warpgroup: one is decoded while the tensor cores read the other.
        "w_smem": _shared((WARPGROUPS, 2, tiles.rows, WIDTH), x.dtype),
    }
    if interpret:  # see _wgmma
        scratch["w_copy"] = plgpu.SMEM((WARPGROUPS, tiles.outputs, tiles.contraction), x.dtype)
        scratch["x_copy"] = plgpu.SMEM((WARPGROUPS, tiles.contraction, tiles.m), x.dtype)
    body = functools.partial(_kernel, tiles=tiles, block=block, leaving=leaving)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tiles.splits, m, outputs), out_dtype),
        scratch_types=scratch,
        grid=(
            tiles.splits,
            pl.cdiv(outputs, WARPGROUPS * tiles.outputs),
            pl.cdiv(m, tiles.m),  # innermost: blocks that run together share W's tiles in cache
        ),
        grid_names=("split", "out", "m"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="nf4_matmul_transposed" if tiles.transposed else "nf4_matmul",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(x, packed, scales, table)


def _kernel(
    x_gmem: Any,
    codes_gmem: Any,
    scales_gmem: Any,
    table_gmem: Any,
    y_gmem: Any,
    *,
    y_smem: Any,
    w_smem: Any,
    tiles: Tiles,
    block: int,
    leaving: int,
    **copies: Any,
) -> None:
    simulated = bool(copies)
    split, out = jax.lax.axis_index("split"), jax.lax.axis_index("out")
    x_rows = jax.lax.axis_index("m") * tiles.m
    warpgroup = jax.lax.axis_index("warpgroup")

    def step(indices: Any, x_smem: Any, codes_smem: Any, scales_smem: Any, carry: Any) -> Any:
        acc, table = carry
        # Overwritten two steps later. A store to shared memory begins with a barrier of the
        # warpgroup, and before that each warp has waited for what read the buffer.
        w = w_smem.at[warpgroup, jax.lax.rem(indices[0], 2)]
        blocks = tiles.rows // block
        for b in range(blocks):
            # This warpgroup's block b among those of the step: its share is rows or columns.
            if tiles.transposed:
                here, columns = warpgroup * blocks + b, pl.ds(0, WIDTH)
            else:
                here, columns = b, pl.ds(warpgroup * WIDTH, WIDTH)
            half = block // 2
            codes = _cast(codes_smem[pl.ds(here * half, half), columns], LAYOUT, simulated)
            scale = _cast(scales_smem[here, columns], LAYOUT.reduce(0), simulated)
            scale = jax.lax.broadcast_in_dim(scale, codes.shape, (1,))
            scale = _cast(scale, LAYOUT, simulated)
            for part, values in enumerate(lookup(codes, table, simulated)):
                # One product in fp32, rounded once: the numbers of reference.dequantize.
                w[pl.ds(b * block + part * half, half), :] = (values * scale).astype(w.dtype)
        plgpu.commit_smem()  # lets the tensor cores see what the threads have written
        _wgmma(acc, w, x_smem, tiles.transposed, **copies)
        # The step before is finished, this one goes on while the next is decoded.
        plgpu.wgmma_wait(1)
        return acc, table

    def compute(run: Any) -> None:
        sums = plgpu.WGMMAAccumulatorRef((tiles.outputs, tiles.m), jnp.float32)

        @functools.partial(pl.run_scoped, acc=sums)
        def _(acc: Any) -> None:
            run((acc, table_gmem[...]))
            y = acc[...].astype(y_gmem.dtype)  # waits for the last multiplication
            mine = y_smem.at[warpgroup]
            columns = pl.ds((out * WARPGROUPS + warpgroup) * tiles.outputs, tiles.outputs)
            for start in range(0, tiles.m, leaving):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                _store_transposed(mine, y[:, start : start + leaving], simulated)
                plgpu.commit_smem()
                rows = pl.ds(x_rows + start, leaving)
                plgpu.copy_smem_to_gmem(mine, y_gmem.at[split, rows, columns])

    def part(per_step: int) -> Any:  # of the contraction, for this split
        return pl.ds(split * tiles.steps * per_step, tiles.steps * per_step)

    def weight(rows: int) -> Any:  # of an array with `rows` rows a step
        if tiles.transposed:
            return pl.ds(out * rows, rows), part(tiles.step_n)
        return part(rows), pl.ds(out * tiles.step_n, tiles.step_n)

    along = (lambda i: (0, i)) if tiles.transposed else (lambda i: (i, 0))
    code_rows, scale_rows = tiles.step_k // 2, tiles.step_k // block
    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(tiles.steps,),
        memory_registers=_COPYING_REGISTERS,
        in_specs=[
            _tile((tiles.m, tiles.contraction), lambda i: (0, i), _swizzled(x_gmem.dtype)),
            _tile((code_rows, tiles.step_n), along, _swizzled(jnp.uint8, WIDTH)),
            _tile((scale_rows, tiles.step_n), along),
        ],
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        max_concurrent_steps=tiles.stages,
        compute_context=compute,
    )(
        x_gmem.at[pl.ds(x_rows, tiles.m), part(tiles.contraction)],
        codes_gmem.at[weight(code_rows)],
        scales_gmem.at[weight(scale_rows)],
    )
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _swizzled(dtype: Any, swizzle: int = 128) -> tuple[Any, ...]:
    """Shared memory in tiles of eight rows of `swizzle` bytes, as TMA and wgmma want it."""
    tile = (8, swizzle // jnp.dtype(dtype).itemsize)
    return plgpu.TilingTransform(tile), plgpu.SwizzleTransform(swizzle)


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=_swizzled(dtype))


def _tile(shape: tuple[int, int], index_map: Any, transforms: tuple[Any, ...] = ()) -> Any:
    # The tensor cores read a step's x during the next step: it is given back one step later.
    return plgpu.BlockSpec(shape, index_map, transforms=transforms, delay_release=1)


# What JAX's interpreter does not know (registers laid out over threads, operands transposed where
# they lie) is said in other words for it, here and in gpu_decode.lookup, and nowhere else.


def _cast(value: jax.Array, layout: Any, simulated: bool) -> jax.Array:
    return value if simulated else plgpu.layout_cast(value, layout)


def _wgmma(
    acc: Any, w: Any, x: Any, transposed: bool, w_copy: Any = None, x_copy: Any = None
) -> None:
    """acc [outputs, m] += W^T x^T (transposed: W x^T) of w [k, n] and x [m, contraction]."""
    if w_copy is not None and x_copy is not None:
        here = jax.lax.axis_index("warpgroup")
        w_copy[here] = w[...] if transposed else w[...].T
        x_copy[here] = x[...].T
        plgpu.wgmma(acc, w_copy.at[here], x_copy.at[here])
    else:
        w = w if transposed else w.transpose((1, 0))
        plgpu.wgmma(acc, w, x.transpose((1, 0)))


def _store_transposed(ref: Any, y: jax.Array, simulated: bool) -> None:
    """y [outputs, m], as wgmma leaves it, into ref [m, outputs]."""
    if simulated:
        ref[...] = y.T
    else:
        # In this layout neighbours along the outputs share a thread and are stored as one word.
        y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
        ref.transpose((1, 0))[...] = y
