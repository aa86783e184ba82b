"""Where stacked lazy weights are consumed: rows in groups, each group times its own weight.

This is `jax.lax.ragged_dot`, by which the experts of a mixture are computed: rows [M, K] sorted by
expert, weights [E, K, N], and how many rows each expert has.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from qlora_jax.lifting.lazy import Lazy
from qlora_jax.lifting.products import matmul, matmul_transposed, promoted
from qlora_jax.lora.array import (
    AdaptedArray,
    cotangent,
    map_stacked,
    together,
    trained_part,
)
from qlora_jax.quant.varying import vary_alike

DECODING_ROWS = 64
"""As many rows as are multiplied in the time that it takes to decode their weight, roughly."""


def ragged_dot_general(eqn: JaxprEqn, x: Any, w: Any, group_sizes: Any) -> jax.Array | None:
    """The rule for x [M, K] and one stack of weights, contracted over K or over N; else None.

    Memory and work are those of the rows alone: each group's rows are taken in blocks, and a block
    decodes the one weight that it is multiplied with. The gradient for what is trained of a stack
    is added where its weight lies; the frozen weights have none.
    """
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_contracted, w_contracted), (_, shared) = numbers.dot_dimension_numbers
    if not isinstance(w, Lazy) or isinstance(x, Lazy) or isinstance(group_sizes, Lazy):
        return None
    if x.ndim != 2 or tuple(x_contracted) != (1,) or shared or group_sizes.ndim != 1:
        return None
    if tuple(numbers.lhs_ragged_dimensions) != (0,) or len(numbers.rhs_group_dimensions) != 1:
        return None
    dims, (group,), (inner,) = w.view.dims, numbers.rhs_group_dimensions, w_contracted
    (outer,) = {0, 1, 2} - {group, inner}
    if w.batch_axis(group) is None or len(w.view.of_kind("batch")) != 1:
        return None
    k, n = w.view.of_kind("k"), w.view.of_kind("n")
    if (dims[inner], dims[outer]) == (k, n):
        product = matmul
    elif (dims[inner], dims[outer]) == (n, k):
        product = matmul_transposed
    else:
        return None
    x = promoted(x, eqn.invars[1].aval)
    if x is None:
        return None
    result: Any = eqn.outvars[0].aval

    def one(rows: jax.Array, weight: Any) -> jax.Array:
        return product(rows, weight, result.dtype, eqn.params["precision"])

    return _grouped(one, result, x, w.array, group_sizes)


def _grouped(
    one: Callable[[jax.Array, Any], jax.Array], result: Any, x: Any, w: Any, sizes: Any
) -> jax.Array:
    """one(rows, weight of their group) for every group of rows; zero for rows that are in none."""
    # Sizes that are constants of the program come as NumPy's, which no traced index fits.
    x, w, sizes = vary_alike((x, w, jnp.asarray(sizes)))

    @jax.custom_vjp
    def run(x: jax.Array, w: Any, sizes: jax.Array) -> jax.Array:
        blocks = _Blocks(len(x), sizes)
        padded = blocks.pad(x)

        def step(i: jax.Array, out: jax.Array) -> jax.Array:
            block = blocks[i]
            return block.write(out, one(block.read(padded), block.weight(w)))

        start = jnp.zeros_like(padded, result.dtype, (len(padded), *result.shape[1:]))
        return jax.lax.fori_loop(0, blocks.count, step, start)[: len(x)]

    def forward(x: jax.Array, w: Any, sizes: jax.Array) -> Any:
        return run(x, w, sizes), (x, w, sizes)

    def backward(kept: Any, g: jax.Array) -> Any:
        x, w, sizes = kept
        blocks = _Blocks(len(x), sizes)
        padded, g = blocks.pad(x), blocks.pad(g)
        trained = trained_part(w)

        def step(i: jax.Array, carry: Any) -> Any:
            dx, sums = carry
            block = blocks[i]
            weight = block.weight(w)

            def of(rows: jax.Array, trained: dict[str, jax.Array]) -> jax.Array:
                return one(rows, together(weight, trained))

            _, pull = jax.vjp(of, block.read(padded), jax.tree.map(block.of_group, trained))
            d_rows, new = pull(block.read(g))
            sums = jax.tree.map(lambda total, d: total.at[block.group].add(d), sums, new)
            return block.write(dx, d_rows), sums

        start = (jnp.zeros_like(padded), jax.tree.map(jnp.zeros_like, trained))
        dx, sums = jax.lax.fori_loop(0, blocks.count, step, start)
        return dx[: len(x)], cotangent(w, sums), None

    run.defvjp(forward, backward)
    return run(x, w, sizes)


class _Blocks:
    """The rows of all groups, cut into blocks of as many rows, in order.

    A group's last block may reach into the rows of the next groups. There it is zero, and since
    blocks are written in order, those rows are overwritten.
    """

    def __init__(self, rows: int, sizes: jax.Array) -> None:
        self.size = block_rows(rows, len(sizes))
        self._sizes = sizes
        self._rows_before = jnp.cumsum(sizes) - sizes
        blocks = -(-sizes // self.size)
        self._blocks_until = jnp.cumsum(blocks)
        self._blocks_before = self._blocks_until - blocks
        self.count = self._blocks_until[-1]

    def pad(self, x: jax.Array) -> jax.Array:
        """Room for the last block."""
        return jnp.pad(x, ((0, self.size), (0, 0)))

    def __getitem__(self, i: jax.Array) -> "_Block":
        group = jnp.sum(self._blocks_until <= i)
        number = i - self._blocks_before[group]
        done = number * self.size
        return _Block(
            group=group,
            number=number,
            start=self._rows_before[group] + done,
            live=jnp.arange(self.size) < self._sizes[group] - done,
        )


class _Block(NamedTuple):
    """Consecutive rows of one group.

    number counts the blocks of the group; live [size] says which rows are the group's.
    """

    group: jax.Array
    number: jax.Array
    start: jax.Array
    live: jax.Array

    def read(self, x: jax.Array) -> jax.Array:
        """Its rows of x, zero where they are another group's."""
        rows = jax.lax.dynamic_slice_in_dim(x, self.start, len(self.live))
        return jnp.where(self.live[:, None], rows, jnp.zeros((), x.dtype))

    def write(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, rows, self.start, 0)

    def of_group(self, leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(leaf, self.group, keepdims=False)

    def weight(self, w: Any) -> Any:
        """The group's weight out of the stack; each block draws a dropout mask of its own."""
        one = map_stacked(self.of_group, w)
        if isinstance(one, AdaptedArray) and one.dropout_key is not None:
            key = jax.random.fold_in(one.dropout_key, self.number)
            one = together(one, {"dropout_key": key})
        return one


def block_rows(rows: int, groups: int) -> int:
    """How many rows to multiply together: a power of two from 8 to 512.

    A group of s rows in blocks of b decodes its weight s/b + 1/2 times on average, and multiplies
    b/2 rows in vain, which costs the least together where b^2 is twice s * DECODING_ROWS.
    """
    best = math.sqrt(2 * DECODING_ROWS * max(rows, 1) / groups)
    return min(max(2 ** round(math.log2(best)), 8), 512)
