"""Where the parts of a 4-bit weight lie on a mesh, and products that each device takes of its own.

A kernel is opaque to the compiler's partitioner, and left alone XLA would decode a weight first and
move it then, at four times the bytes; so what travels between devices is said here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from qlora_jax.quant import blockwise

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Over which axes of `mesh` a weight [K, N] is split, K in whole blocks.

    rows: the axes over which the rows of inputs are split (the examples of a batch). A weight that
    is split over one of those too (FSDP) is gathered for its product, as 4-bit codes and stored
    scales; over any other axis (tensor parallelism) it stays split. Where K or N is split over both
    kinds, those of rows come last, so that what is gathered lies side by side.
    """

    mesh: Mesh
    k: Names = ()
    n: Names = ()
    rows: Names = ()

    def __post_init__(self) -> None:
        for names in (self.k, self.n):
            if list(names) != sorted(names, key=self.rows.__contains__):
                raise ValueError(f"{names}: those of the rows, {self.rows}, must come last")

    @property
    def matrix(self) -> PartitionSpec:
        """Of the codes [K/2, N] and the scales [K/block, N]."""
        return PartitionSpec(self.k or None, self.n or None)

    def count(self, names: Names) -> int:
        """How many parts those axes make."""
        count = 1
        for name in names:
            count *= self.mesh.shape[name]
        return count


def placed(product: Callable[..., jax.Array], placement: Placement) -> Callable[..., jax.Array]:
    """`product` (x, weight, transposed, *, part, out_dtype, ...) of one device, over the mesh.

    The result is that of one device, x [M, in] and out [M, out] being split over `rows` where M
    allows it, and otherwise over the axes of the weight alone. Partial sums are added in fp32.
    """

    def call(
        x: jax.Array, weight: tuple[Any, ...], transposed: bool, *, out_dtype: Any, **how: Any
    ) -> jax.Array:
        codes, scales, codebook, *nested = weight
        rows = placement.rows
        # A few rows (those of decoding) go to where the weight lies, and it need not be gathered.
        rows = () if x.shape[0] % placement.count(rows) else rows
        inner, outer = placement.k, placement.n
        if transposed:
            inner, outer = outer, inner
        inner, outer = (tuple(n for n in names if n not in rows) for names in (inner, outer))
        kept = {*inner, *outer}

        def local(x: Any, codes: Any, scales: Any, codebook: Any, *nested: Any) -> jax.Array:
            for axis, names in enumerate((placement.k, placement.n)):
                if moved := tuple(n for n in names if n not in kept):
                    codes, scales = (
                        jax.lax.all_gather(a, moved, axis=axis, tiled=True) for a in (codes, scales)
                    )
            part = _part(scales, kept) if kept else None
            weight = (codes, scales, codebook, *nested)
            dtype = jnp.float32 if inner else out_dtype
            out = product(x, weight, transposed, part=part, out_dtype=dtype, **how)
            return jax.lax.psum(out, inner).astype(out_dtype) if inner else out

        def _part(scales: jax.Array, kept: set[str]) -> blockwise.Part:
            """256 scales share a nested absmax, across columns: each device finds its own by their
            place in the whole weight."""
            first, whole = [], []
            for size, names in zip(scales.shape, (placement.k, placement.n), strict=True):
                here = tuple(n for n in names if n in kept)
                first.append(size * jax.lax.axis_index(here) if here else 0)
                whole.append(size * placement.count(here))
            return blockwise.Part(first, (whole[0], whole[1]))

        spec = placement.matrix
        mapped = jax.shard_map(
            local,
            mesh=placement.mesh,
            in_specs=(
                PartitionSpec(rows or None, inner or None),
                spec,
                spec,
                *[PartitionSpec()] * (1 + len(nested)),
            ),
            out_specs=PartitionSpec(rows or None, outer or None),
            check_vma=False,
        )
        return mapped(x, codes, scales, codebook, *nested)

    return call
