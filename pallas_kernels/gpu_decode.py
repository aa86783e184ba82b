"""4-bit codes to values in the registers of a warpgroup (Mosaic GPU).

The lookup. A table of sixteen can be searched by a tree of selects (15 selects an element, which
Hopper issues at 64 lanes a cycle: decoding would take longer than multiplying), read from shared
memory (an address to compute and a load an element), or shuffled: every lane holds one entry of
the table and asks the lane that its code names. A shuffle takes the low bits of the index by
itself, so that a code costs one shift and one shuffle (32 lanes a cycle, beside the arithmetic
units), and the values are the code book's own fp32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

# Codes, scales and values of a [rows, 64] tile: a warp holds two whole rows, a thread four
# neighbouring columns of every eighth row. So a thread needs four scales a block, its codes come
# as one word, and 16 lanes write 128 contiguous bytes of the decoded tile: no bank is hit twice.
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
# shfl.sync's operand c: half-warps of 16 lanes (bits 8 and up hold what the lane keeps of its own
# number, 0b10000), no clamping (0b11111).
_HALF_WARPS = 0b10000 << 8 | 0b11111


def lane_table(codebook: jax.Array) -> jax.Array:
    """codebook fp32 [16] -> [128]: thread i of a warpgroup finds entry i % 16, twice in a warp."""
    return jnp.tile(codebook.astype(jnp.float32), 8)


def lookup(codes: jax.Array, table: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """codes uint8 [rows, 64], table as `lane_table` -> values fp32 [rows, 64] of the low and of
    the high nibbles. `interpret` says the same in plain JAX: a CPU has no lanes to shuffle."""
    if interpret:
        book = table[:16]
        return book[codes & 15], book[codes >> 4]
    values = plgpu.ShapeDtypeStruct(codes.shape, jnp.float32, layout=LAYOUT)
    shuffled = plgpu.inline_mgpu(
        arg_types=(LAYOUT, plgpu.Layout.WG_STRIDED((128,), vec_size=1)),
        return_type=(values, values),
    )(_shuffle)
    return shuffled(codes, table)


def _shuffle(context: Any, codes: Any, table: Any) -> tuple[Any, Any]:
    """The lookup on fragments: codes in words of four bytes, one table entry a lane."""
    import numpy as np
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

    del context
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    four_values = ir.VectorType.get((4,), f32)

    def constant(value: int) -> Any:
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    def first(one: Any) -> Any:
        return vector.extract(one, dynamic_position=[], static_position=[0])

    every_lane, half_warps = constant(-1), constant(_HALF_WARPS)
    (entry,) = table.registers.flat
    entry = arith.bitcast(i32, first(entry))
    low = np.empty_like(codes.registers)
    high = np.empty_like(codes.registers)
    for index, register in np.ndenumerate(codes.registers):
        word = first(vector.bitcast(ir.VectorType.get((1,), i32), register))
        for values, nibble in ((low, 0), (high, 4)):
            four = llvm.mlir_undef(four_values)
            for byte in range(4):
                lane = arith.shrui(word, constant(8 * byte + nibble))
                found = nvvm.shfl_sync(every_lane, entry, lane, half_warps, nvvm.ShflKind.idx)
                four = llvm.insertelement(four, arith.bitcast(f32, found), constant(byte))
            values[index] = four

    def array(registers: Any) -> Any:
        return mgpu.FragmentedArray(_registers=registers, _layout=codes.layout, _is_signed=None)

    return array(low), array(high)
