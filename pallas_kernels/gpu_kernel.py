"""The body of the Mosaic GPU kernels: y^T = W^T x^T, or W g^T, W decoded tile by tile.

W is the left operand, so that the rows of x, often few, are the short side of wgmma: it multiplies
64 rows of its left operand by 8 to 256 columns of the right one.

A block has three warpgroups. One brings tiles of x, codes and scales into shared memory (TMA,
several steps ahead); two decode one tile of W each, [rows, 64], leave it in shared memory and let
the tensor cores multiply it while they decode the next one into a second buffer. (W could stay in
registers for W g^T, where neighbours in memory are neighbours in the sum; for W^T x^T they are
not, and a transposition through shared memory is what storing it is.)
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_decode import LAYOUT, WIDTH, lookup

WARPGROUPS = 2  # that compute


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    m: rows of x a thread block takes. rows: rows of W (k) a warpgroup decodes in a step, by 64
    columns. splits: into how many parts, summed afterwards, the contraction is cut. stages: steps
    of TMA in flight.
    """

    m: int
    rows: int
    splits: int
    stages: int


def multiply(
    x: jax.Array,
    packed: jax.Array,
    scales: jax.Array,
    table: jax.Array,
    out_dtype: Any,
    tiles: Tiles,
    transposed: bool,
    interpret: Any,
) -> jax.Array:
    """x [M, K] (transposed: [M, N]) -> partial sums [splits, M, N] (transposed: [.., M, K]).

    packed uint8 [K/2, N], scales fp32 [K/block, N], table fp32 [128].
    """
    m = x.shape[0]
    k, n = 2 * packed.shape[0], packed.shape[1]
    block = k // scales.shape[0]
    rows = tiles.rows
    # A step of the block: step_k x step_n of W; of these the warpgroups share the outputs.
    step_k, step_n = (WARPGROUPS * rows, WIDTH) if transposed else (rows, WARPGROUPS * WIDTH)
    contracted, step, outputs, step_out = (
        (n, step_n, k, step_k) if transposed else (k, step_k, n, step_n)
    )
    wg_out = rows if transposed else WIDTH
    steps = pl.cdiv(pl.cdiv(contracted, step), tiles.splits)
    piece = min(tiles.m, 64)  # rows of x that leave at once

    def kernel(x_gmem, codes_gmem, scales_gmem, table_gmem, out_gmem, out_smem, w_smem, *copies):
        warpgroup = jax.lax.axis_index("wg")
        split = jax.lax.axis_index("split")
        m_start = jax.lax.axis_index("m") * tiles.m
        out_start = jax.lax.axis_index("out") * step_out

        def step_body(indices, x_smem, codes_smem, scales_smem, carry):
            acc, values = carry
            (i,) = indices
            w = w_smem.at[warpgroup, jax.lax.rem(i, 2)]
            for b in range(rows // block):
                if transposed:
                    first, columns = warpgroup * (rows // block) + b, pl.ds(0, WIDTH)
                else:
                    first, columns = b, pl.ds(warpgroup * WIDTH, WIDTH)
                half = block // 2
                codes = plgpu.layout_cast(codes_smem[pl.ds(first * half, half), columns], LAYOUT)
                scale = plgpu.layout_cast(scales_smem[first, columns], LAYOUT.reduce(0))
                scale = jax.lax.broadcast_in_dim(scale, codes.shape, (1,))
                scale = plgpu.layout_cast(scale, LAYOUT)
                for part, value in enumerate(lookup(codes, values, bool(interpret))):
                    decoded = (value * scale).astype(x.dtype)
                    w[pl.ds(b * block + part * half, half), :] = decoded
            plgpu.commit_smem()
            _wgmma(acc, w, x_smem, transposed, copies)
            plgpu.wgmma_wait(1)
            return acc, values

        def compute(run_pipeline):
            @functools.partial(pl.run_scoped, acc=plgpu.ACC((wg_out, tiles.m), jnp.float32))
            def _(acc):
                run_pipeline((acc, table_gmem[...]))
                y = acc[...].astype(out_dtype)  # waits for the last wgmma
                for start in range(0, tiles.m, piece):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    _store_transposed(
                        out_smem.at[warpgroup], y[:, start : start + piece], bool(interpret)
                    )
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[warpgroup],
                        out_gmem.at[
                            split,
                            pl.ds(m_start + start, piece),
                            pl.ds(out_start + warpgroup * wg_out, wg_out),
                        ],
                    )

        first_step = split * steps
        step_of = (lambda i: (0, i)) if transposed else (lambda i: (i, 0))
        pipeline = plgpu.emit_pipeline_warp_specialized(
            step_body,
            grid=(steps,),
            memory_registers=40,
            in_specs=[
                _tile((tiles.m, step), lambda i: (0, i), _swizzled(x.dtype)),
                _tile((step_k // 2, step_n), step_of, _swizzled(jnp.uint8, 64)),
                _tile((step_k // block, step_n), step_of, ()),
            ],
            wg_axis="wg",
            num_compute_wgs=WARPGROUPS,
            max_concurrent_steps=tiles.stages,
            compute_context=compute,
        )
        # Beyond the arrays TMA reads zeros, and a zero scale makes any code a zero.
        inner = lambda per_step: pl.ds(first_step * per_step, steps * per_step)  # noqa: E731
        outer = lambda size: pl.ds(jax.lax.axis_index("out") * size, size)  # noqa: E731
        part = (
            (lambda size: (outer(size), inner(step_n)))
            if transposed
            else (lambda size: (inner(size), outer(step_n)))
        )
        pipeline(
            x_gmem.at[pl.ds(m_start, tiles.m), inner(step)],
            codes_gmem.at[part(step_k // 2)],
            scales_gmem.at[part(step_k // block)],
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = [
        plgpu.SMEM((WARPGROUPS, piece, wg_out), out_dtype, transforms=_swizzled(out_dtype)),
        plgpu.SMEM((WARPGROUPS, 2, rows, WIDTH), x.dtype, transforms=_swizzled(x.dtype)),
    ]
    if interpret:
        scratch += [
            plgpu.SMEM((WARPGROUPS, wg_out, step), x.dtype),
            plgpu.SMEM((WARPGROUPS, step, tiles.m), x.dtype),
        ]
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles.splits, m, outputs), out_dtype),
        scratch_types=scratch,
        grid=(tiles.splits, pl.cdiv(outputs, step_out), pl.cdiv(m, tiles.m)),
        grid_names=("split", "out", "m"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(x, packed, scales, table)


def _swizzled(dtype: Any, swizzle: int = 128) -> tuple[Any, ...]:
    """Shared memory in tiles of eight rows of `swizzle` bytes, as TMA and wgmma want it."""
    tile = (8, swizzle // jnp.dtype(dtype).itemsize)
    return plgpu.TilingTransform(tile), plgpu.SwizzleTransform(swizzle)


def _tile(shape: tuple[int, int], index_map: Any, transforms: tuple[Any, ...]) -> Any:
    # The tensor cores read a step's x during the next step: it is given back one step later.
    return plgpu.BlockSpec(shape, index_map, transforms=transforms, delay_release=1)


def _wgmma(acc: Any, w: Any, x: Any, transposed: bool, copies: Any) -> None:
    """acc [outputs, m] += W^T x^T (transposed: W x^T) of w [k, n] and x [m, contracted].

    The interpreter multiplies nothing that is transposed by its reference, so it gets copies.
    """
    if copies:
        w_copy, x_copy = (copy.at[jax.lax.axis_index("wg")] for copy in copies)
        w_copy[...] = w[...] if transposed else w[...].T
        x_copy[...] = x[...].T
        plgpu.wgmma(acc, w_copy, x_copy)
        return
    w = w if transposed else plgpu.transpose_ref(w, (1, 0))
    plgpu.wgmma(acc, w, plgpu.transpose_ref(x, (1, 0)))


def _store_transposed(ref: Any, y: jax.Array, interpret: bool) -> None:
    """y [outputs, m], as wgmma leaves it, into ref [m, outputs]."""
    if interpret:
        ref[...] = y.T
    else:
        # A layout in which neighbours along the outputs share a thread: they are stored as one.
        y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.transpose_ref(ref, (1, 0))[...] = y
