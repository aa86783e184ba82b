"""Adding adapters into dense weights, and taking them out again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.errors import QloraError
from qlora_jax.lora import dora
from qlora_jax.lora.adapters import Adapters, attach
from qlora_jax.lora.array import LoraWeights, dense_base, is_weight
from qlora_jax.lora.tree import named_leaves
from qlora_jax.lora.vera import PROJECTIONS, VeraWeights
from qlora_jax.quant import QuantizedArray, path_str


def merge(params: Any, adapters: Adapters, dtype: Any = None) -> Any:
    """The tree with all weights dense and W + scaling * A B, or what the variant makes, for W.

    Sums are taken in fp32 and rounded once to `dtype` (each weight's own by default). A 4-bit base
    is dequantized, never requantized, so that the result computes what was trained; `merge_errors`
    says what the rounding costs. To merge into the original 16-bit weights, give those as `params`.
    """

    def one(base: Any, leaf: Any) -> Any:
        if is_weight(leaf):
            return leaf.dequantize(dtype)
        # One trained in full was so in fp32.
        own = base.dtype if dtype is None else dtype
        return leaf.astype(own) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, params, attach(params, adapters), is_leaf=is_weight)


def unmerge(params: Any, adapters: Adapters) -> Any:
    """The inverse of `merge` on dense weights, up to the rounding of their dtype.

    Raises QloraError for adapters that do not fit, for quantized weights, for weights trained in
    full, and for a DoRA adapter with columns larger than the weight's own: those do not say what
    they were.
    """
    for path, leaf in named_leaves(params).items():
        if path in adapters and isinstance(leaf, QuantizedArray):
            raise QloraError(f"{path} is quantized: only a merged, dense tree can be unmerged")
    negated: Adapters = {}
    for path, adapter in adapters.items():
        if isinstance(adapter, LoraWeights) and adapter.magnitude is None:
            negated[path] = dataclasses.replace(adapter, a=-adapter.a)
        elif isinstance(adapter, VeraWeights):
            negated[path] = dataclasses.replace(adapter, lambda_b=-adapter.lambda_b)
        elif path == PROJECTIONS:
            negated[path] = adapter
        elif not isinstance(adapter, LoraWeights):
            raise QloraError(f"{path} was trained in full: what it was before is not known")
    # For its errors: adapters under DoRA are not in `negated`, so that merge would not see them.
    attach(params, adapters)

    def one(path: Any, leaf: Any) -> Any:
        adapter = adapters.get(path_str(path))
        if isinstance(adapter, LoraWeights) and adapter.magnitude is not None:
            return dora.base_of(leaf, adapter).astype(leaf.dtype)
        return leaf

    return merge(jax.tree_util.tree_map_with_path(one, params, is_leaf=is_weight), negated)


def merge_errors(
    params: Any, adapters: Adapters, dtype: Any, original: Any = None
) -> dict[str, float]:
    """Path -> ||merged - trained|| / ||trained|| (Frobenius), of weights in 4 bits or trained.

    "Trained" is what training saw in fp32: the frozen (4-bit) weight plus its adapter, or a weight
    trained in full. Dense weights that were not trained are left out: merging casts them at most.
    "Merged" is what `merge(params, adapters, dtype)` holds, or with `original` (a dense tree) what
    `merge(original, adapters, dtype)` holds: then it shows the quantization error too.
    """
    target = named_leaves(attach(original if original is not None else params, adapters))
    errors = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(attach(params, adapters), is_leaf=is_weight)
    for path, leaf in flat:
        name = path_str(path)
        if is_weight(leaf) or name in adapters:
            errors[name] = float(_relative_error(target[name], leaf, jnp.dtype(dtype)))
    return errors


def _relative_error(target: Any, trained: Any, dtype: Any) -> jax.Array:
    merged = target.dequantize(dtype) if is_weight(target) else dense_base(target, dtype)
    exact = trained.dequantize(jnp.float32) if is_weight(trained) else trained
    error = jnp.linalg.norm(merged.astype(jnp.float32) - exact)
    # A bias that is still zero has no error either.
    return error / jnp.maximum(jnp.linalg.norm(exact), jnp.finfo(jnp.float32).tiny)
