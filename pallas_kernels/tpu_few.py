"""x @ W for few rows of x on TPU: what a grid step does with its tile of W.

With few rows the matrix unit has time to spare and the vector unit has not: what is done to every
weight is what a step costs.

- No weight is scaled. The matrix unit multiplies levels, rounded to bf16 (as accurate as rounding
  level times scale), and the sum over each block of K is scaled: rows / block of the work. The
  matrix unit sums over several blocks at once; to keep them apart, x enters once for each of them,
  with zeros for the others.
- Codes are not widened. A register holds 32 x 128 bytes, and where the chip gathers bytes, one
  gather finds one byte of the bf16 level for 4096 codes; two of them are interleaved.

Interleaving leaves 32 rows of W with the even ones first. The columns of x follow: x is small.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_decode import LANES, SUBLANES, gather

DEEPEST = 5632  # rows of W in a grid step; 11008 and 22016, LLaMA's, take two and four of them
MOST_ROWS = 64  # with more, the zeros that are multiplied cost more than scaling weights
GROUP = 32  # rows of W that the low (or high) halves of a register of codes hold
EVEN, ODD = 0x00FF00FF, -0x00FF0100  # bytes of a word


def suits(m: int, block: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether M rows are few, in the one type that the levels are rounded to; and a register of
    codes must lie in one block, a block in whole passes of the matrix unit or several in one.
    """
    return m <= MOST_ROWS and dtype == jnp.bfloat16 and block >= 64 and block & (block - 1) == 0


def tile_depth(k: int, block: int) -> int:
    """Rows of W in a grid step: in equal steps, whole blocks and a multiple of 512.

    Many, because a step takes some 200 cycles to start and to end; not more, because nothing hides
    the time in which the first tile arrives.
    """
    steps, multiple = pl.cdiv(k, DEEPEST), max(512, block)
    return pl.cdiv(k, steps * multiple) * multiple


def level_tables(codebook: jax.Array, target: int) -> jax.Array:
    """codebook [16] -> the registers that are gathered from, int32 [8 T, 128].

    The low bytes of the bf16 levels, the high bytes, and for v5 pairs of levels in a word: first of
    those whose codes differ in bit 3, then of those whose codes differ in bit 0.
    """
    bits = jax.lax.bitcast_convert_type(codebook.astype(jnp.bfloat16), jnp.uint16)
    bits = bits.astype(jnp.uint32)
    tables = []
    for byte in (bits & 255, bits >> 8):
        if target > 5:  # byte i all along row i of 32
            words = (byte.reshape(4, 4) << jnp.arange(0, 32, 8, dtype=jnp.uint32)).sum(1)
            tables.append(jnp.pad(words.astype(jnp.uint32), (0, SUBLANES - 4))[:, None])
        else:  # byte i in every row of lane i
            tables.append(jnp.pad(byte * 0x01010101, (0, LANES - 16))[None])
    if target == 5:
        tables += [(bits[:8] | bits[8:] << 16)[:, None], (bits[0::2] | bits[1::2] << 16)[:, None]]
    registers = jnp.concatenate([jnp.broadcast_to(t, (SUBLANES, LANES)) for t in tables])
    return jax.lax.bitcast_convert_type(registers, jnp.int32)


def add_product(
    sum_ref: Any,
    x_ref: Any,
    codes_ref: Any,
    scales_ref: Any,
    tables_ref: Any,
    *,
    size: int | None,
    rows: int,
    target: int,
) -> None:
    """sum[:rows] += x[:rows] @ W, for the tile of W of this grid step.

    x bf16 [M, K], M a multiple of 16; of the tile, codes uint8 [k/2, n] and scales fp32
    [k/block, n] or [k/block, 1, n]. size: K if the tile may reach beyond it, else None.
    """
    tile_k, tile_n = 2 * codes_ref.shape[0], codes_ref.shape[1]
    block = tile_k // scales_ref.shape[0]
    first = pl.program_id(2) * tile_k
    depth = 256 if target > 5 else 128  # and width, of the matrix unit
    apart = min(block, depth)  # rows of W whose sums share a scale
    tables = [tables_ref[i : i + SUBLANES] for i in range(0, tables_ref.shape[0], SUBLANES)]
    for start in range(0, tile_k, depth):
        groups = [_Group.of(k, block, target) for k in range(start, start + depth, GROUP)]
        x = _in_order(x_ref[:, pl.ds(pl.multiple_of(first + start, depth), depth)], groups)
        index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        if size is not None:
            x = jnp.where(index < size - first - start, x, 0)
        once_each = [
            x if apart == depth else jnp.where(jax.lax.div(index, apart) == i, x, 0)
            for i in range(depth // apart)
        ]
        once_each = pltpu.bitcast(jnp.concatenate(once_each), jnp.bfloat16)
        for n in range(0, tile_n, depth):
            columns = slice(n, min(n + depth, tile_n))
            lanes = range(n, columns.stop, LANES)
            w = [jnp.concatenate([g.decode(codes_ref, i, tables) for g in groups]) for i in lanes]
            sums = jnp.dot(
                once_each, jnp.concatenate(w, axis=1), preferred_element_type=jnp.float32
            )
            total = sum_ref[:rows, columns]
            for i, k in enumerate(range(start, start + depth, apart)):
                scale = _row(scales_ref, k // block, columns)
                if size is not None:
                    scale = jnp.where(first + k < size, scale, 0.0)
                total += sums[i * x_ref.shape[0] :][:rows] * scale
            sum_ref[:rows, columns] = total


def _row(scales_ref: Any, index: int, columns: slice) -> jax.Array:
    if len(scales_ref.shape) == 3:
        return scales_ref[index, :, columns]
    return scales_ref[index : index + 1, columns]


@dataclasses.dataclass(frozen=True)
class _Group:
    """32 rows of W: the low or the high halves of a register of codes."""

    register: int  # which, along K
    high: bool
    target: int

    @staticmethod
    def of(k: int, block: int, target: int) -> "_Group":
        """That which begins at row k of a tile."""
        half = block // 2
        byte_row = k // block * half + k % half
        return _Group(byte_row // GROUP, k % block >= half, target)

    @property
    def by_words(self) -> bool:
        """Whether levels are looked up as words by the vector unit: on v5, which gathers bytes
        along lanes only. Its cross-lane units keep up with five in sixteen, the vector unit with
        the others.
        """
        return self.target == 5 and (self.high or self.register * 5 % 8 >= 5)

    def decode(self, codes_ref: Any, lane: int, tables: list[jax.Array]) -> jax.Array:
        """Levels bf16 [32, 128] of the 128 columns from `lane` on, in the order of `_in_order`."""
        rows = slice(self.register * GROUP, (self.register + 1) * GROUP)
        codes = pltpu.bitcast(codes_ref[rows, lane : lane + LANES], jnp.int32)
        if self.by_words and self.high:
            return _words(tables[3], _shifted(codes, 5) & 0x07070707, codes & 0x10101010)
        if self.by_words:
            return _words(tables[2], codes & 0x07070707, (codes << 1) & 0x10101010)
        codes = (_shifted(codes, 4) if self.high else codes) & 0x0F0F0F0F
        return _bytes(tables[0], tables[1], codes, axis=0 if self.target > 5 else 1)


def _bytes(low: jax.Array, high: jax.Array, codes: jax.Array, axis: int) -> jax.Array:
    """Levels [32, 128], even rows first, of the codes in the bytes of int32 [8, 128]."""
    codes = pltpu.bitcast(codes, jnp.int8)
    low = pltpu.bitcast(gather(pltpu.bitcast(low, jnp.int8), codes, axis), jnp.int32)
    high = pltpu.bitcast(gather(pltpu.bitcast(high, jnp.int8), codes, axis), jnp.int32)
    even = (low & EVEN) | ((high << 8) & ODD)
    odd = (_shifted(low, 8) & EVEN) | (high & ODD)
    return pltpu.bitcast(jnp.concatenate([even, odd]), jnp.bfloat16)


def _words(pairs: jax.Array, index: jax.Array, upper: jax.Array) -> jax.Array:
    """Levels [32, 128] in the order of W's rows: of pair `index`, the upper where `upper` is 16.

    Both are bytes of int32 [8, 128]. Eight entries are what a gather along sublanes reaches.
    """
    index, upper = (pltpu.bitcast(b, jnp.int8).astype(jnp.int32) for b in (index, upper))
    levels = [
        jax.lax.shift_right_logical(gather(pairs, index[r : r + 8], 0), upper[r : r + 8])
        for r in range(0, GROUP, SUBLANES)
    ]
    return pltpu.bitcast(jnp.concatenate(levels).astype(jnp.int16), jnp.bfloat16)


def _in_order(x: jax.Array, groups: list[_Group]) -> jax.Array:
    """x bf16 [M, K] as words [M/2, K] of two rows, its columns in the order of the groups' rows."""
    x = pltpu.bitcast(x, jnp.int32)
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    evens_first = (lane & -GROUP) | ((lane << 1) & (GROUP - 2)) | (_shifted(lane, 4) & 1)
    parts = []
    for c in range(0, x.shape[1], LANES):
        four = groups[c // GROUP : (c + LANES) // GROUP]
        keep = sum(g.by_words << i for i, g in enumerate(four))
        order = jnp.where(jnp.right_shift(keep, _shifted(lane, 5)) & 1 == 1, lane, evens_first)
        rows = [
            gather(x[r : r + SUBLANES, c : c + LANES], order, 1)
            for r in range(0, x.shape[0], SUBLANES)
        ]
        parts.append(jnp.concatenate(rows))
    return jnp.concatenate(parts, axis=1)


def _shifted(words: jax.Array, by: Any) -> jax.Array:
    return jax.lax.shift_right_logical(words, jnp.int32(by))
