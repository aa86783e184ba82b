"""lift: the transform that makes any function of dense weights accept 4-bit and adapted ones.

The function is traced on abstract dense weights; its jaxpr is then evaluated with the real ones,
which flow lazily to where they are consumed. There the 4-bit product and the low-rank path stand in
for the dense product. What a weight is, is known by dataflow alone: nothing is patched, and nothing
is matched by name or shape.
"""

import contextvars
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.extend.core import Literal

from qlora_jax.lifting.lazy import Lazy
from qlora_jax.lifting.walk import Evaluation
from qlora_jax.lora.array import is_weight
from qlora_jax.lora.dora import settle
from qlora_jax.quant import path_str

Function = TypeVar("Function", bound=Callable[..., Any])

_tracing = contextvars.ContextVar("_tracing", default=False)


def tracing() -> bool:
    """Whether `lift` traces what calls this: arrays then may stand for weights in 4 bits or with
    adapters."""
    return _tracing.get()


def lift(fn: Function, *, strict: bool = False) -> Function:
    """`fn`, accepting QuantizedArray and AdaptedArray leaves wherever its arguments have weights.

    fn: any function that jax.jit could trace: a Linen or NNX model's apply, or one written by hand.
    Weights may pass through casts, transposes, reshapes, slices of stacked axes, jit, scan, while,
    cond, checkpoint, custom_jvp, custom_vjp and shard_map; they are consumed by dot_general (and so
    einsum), by ragged_dot (stacked experts), by gather (embeddings) and by convolutions. The result
    can be jitted, vmapped and differentiated in reverse mode. Forward mode (jax.jvp, jax.jacfwd)
    raises JAX's TypeError where it meets a product with a weight, which has a custom_vjp. Arguments
    that are no arrays, such as flags, reach `fn` as they are.

    A weight that is used in any other way is made dense there; this is logged once, with the
    primitive and the parameter's path, or with strict=True raises QloraError. A weight that `fn`
    returns unchanged is returned as it came.
    """
    seen: set[tuple[str, str]] = set()

    @functools.wraps(fn)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        flat, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_weight)
        leaves = [leaf for _, leaf in flat]
        if not any(map(is_weight, leaves)):
            return fn(*args, **kwargs)
        traced = [i for i, leaf in enumerate(leaves) if is_weight(leaf) or _is_array(leaf)]

        def on_arrays(*arrays: Any) -> Any:
            filled = list(leaves)
            for i, array in zip(traced, arrays, strict=True):
                filled[i] = array
            args, kwargs = jax.tree.unflatten(tree, filled)
            before = _tracing.set(True)
            try:
                return fn(*args, **kwargs)
            finally:
                _tracing.reset(before)

        jaxpr, out_shape = jax.make_jaxpr(on_arrays, return_shape=True)(
            *(_abstract(leaves[i]) for i in traced)
        )
        # Norms of DoRA are taken once for all uses of a weight, but of none that is not used: that
        # may belong to a program around this one.
        used = {
            var for eqn in jaxpr.jaxpr.eqns for var in eqn.invars if not isinstance(var, Literal)
        }
        inputs, came = [], {}
        for i, var in zip(traced, jaxpr.jaxpr.invars, strict=True):
            leaf = settle(leaves[i]) if var in used else leaves[i]
            came[id(leaf)] = leaves[i]
            inputs.append(Lazy.of(leaf, _name(flat[i][0])) if is_weight(leaf) else leaf)
        evaluation = Evaluation(strict=strict, seen=seen)
        outputs = evaluation.walk(jaxpr.jaxpr, jaxpr.consts, inputs)
        outputs = [
            came.get(id(x.array), x.array)
            if isinstance(x, Lazy) and x.is_whole()
            else evaluation.dense(x, "return")
            for x in outputs
        ]
        return jax.tree.unflatten(jax.tree.structure(out_shape), outputs)

    return lifted  # type: ignore[return-value]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _abstract(leaf: Any) -> Any:
    """The type of a leaf; of a weight, that of the dense array it stands for."""
    if not is_weight(leaf):
        return jax.typeof(leaf)
    aval = jax.typeof(jax.tree.leaves(leaf)[0])
    # Inside shard_map a type also says over which mesh axes it varies; JAX has named that twice.
    names = ("vma", "manual_axis_type")
    manual = {name: getattr(aval, name) for name in names if hasattr(aval, name)}
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, **manual)


def _name(path: Any) -> str:
    """The parameter's path inside its argument."""
    _, argument, *inside = path
    return path_str(tuple(inside)) if inside else path_str((argument,))
