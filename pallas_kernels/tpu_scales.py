"""The levels of 8-bit scales on TPU (double quantization).

XLA's gather takes an element at a time there: by the compiler's own estimate, 1.5 ms for the scales
of a weight of 4096 x 4096 on v5e, longer than multiplying 4096 rows by it. A tree of selects in
plain JAX is fast enough, but takes half as long again to compile a train step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu_decode import LANES, SUBLANES, gather

ROWS, COLUMNS = 32, 512  # of a grid step: a register of bytes has 32 rows


@functools.partial(jax.jit, static_argnums=2, inline=True)
def look_up(table: jax.Array, codes: jax.Array, interpret: Any = False) -> jax.Array:
    """table[codes] for table fp32 [256] and codes uint8 [R, N] -> fp32 [R, N].

    interpret: as in pallas_call, for machines without a TPU.
    """
    rows, n = codes.shape
    codes = jnp.pad(codes, ((0, -rows % ROWS), (0, 0)))
    halves = jnp.repeat(table.reshape(2, 1, LANES), SUBLANES, axis=1).reshape(-1, LANES)
    tile = pl.BlockSpec((ROWS, COLUMNS), lambda i, j: (i, j))
    levels = pl.pallas_call(
        _kernel,
        grid=(codes.shape[0] // ROWS, pl.cdiv(n, COLUMNS)),
        in_specs=[tile, pl.BlockSpec(halves.shape, lambda i, j: (0, 0))],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(codes.shape, jnp.float32),
        interpret=interpret,
        name="nf4_scales",
    )(codes, halves)
    return levels[:rows]


def _kernel(codes_ref: Any, halves_ref: Any, out_ref: Any) -> None:
    codes = codes_ref[...].astype(jnp.int32)
    low, high = halves_ref[:SUBLANES], halves_ref[SUBLANES:]
    for r in range(0, ROWS, SUBLANES):
        for c in range(0, COLUMNS, LANES):
            register = codes[r : r + SUBLANES, c : c + LANES]
            lane = register & (LANES - 1)
            out_ref[r : r + SUBLANES, c : c + LANES] = jnp.where(
                register < LANES, gather(low, lane, axis=1), gather(high, lane, axis=1)
            )
