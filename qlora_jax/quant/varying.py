"""Types inside shard_map, where every array is known to vary, or not, over each mesh axis.

JAX aligns the operands of its own operations, and sums cotangents over the axes that it added; a
custom_vjp function is opaque to that, so its operands must be alike before it is called.
"""

from typing import Any

import jax


def vary_alike(tree: Any) -> Any:
    """Every leaf marked as varying over all the manual axes over which any of them varies."""
    axes = set().union(*(_varying(leaf) for leaf in jax.tree.leaves(tree)))

    def one(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, tree) if axes else tree


def _varying(x: Any) -> frozenset[str]:
    aval = jax.typeof(x)
    # Named `vma` until JAX 0.10, part of `manual_axis_type` since.
    kind = getattr(aval, "manual_axis_type", None)
    return aval.vma if kind is None else kind.varying
