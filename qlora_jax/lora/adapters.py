"""Making adapters for a parameter tree, putting them into it, counting them."""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import QloraError
from qlora_jax.lora.array import LoraArray, LoraWeights, is_weight
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import check_patterns, module_name, select_full, select_targets
from qlora_jax.quant import Policy, QuantizedArray, path_str

Adapters = dict[str, Any]
"""Path of a parameter -> LoraWeights, or a dense fp32 array for one that is trained in full.

Every array in it is trainable, so that it is what gradients and optimizer state are taken of.
"""


def init(
    key: jax.Array,
    params: Any,
    config: LoraConfig,
    *,
    axes: Mapping[str, tuple[int, int]] | None = None,
) -> Adapters:
    """Fresh adapters for `params`: A kaiming-uniform with a = sqrt(5), B zero, as LoRA and PEFT do.

    Of an embedding A is zero and B standard normal, since it is A that is looked up. axes: as in
    `Policy`, for dense kernels that are not [..., K, N]; quantized ones know theirs. Only shapes of
    `params` are read, so they may be abstract. Raises QloraError for targets, and for patterns of
    ranks and alphas, that match nothing.
    """
    leaves = named_leaves(params)
    reading = Policy(axes=axes or {})
    targets = select_targets({path: tuple(leaf.shape) for path, leaf in leaves.items()}, config)
    check_patterns(config, map(module_name, targets))
    adapters: Adapters = {}
    for path in targets:
        batch, k_shape, n_shape = _split_shape(path, leaves[path], reading)
        module = module_name(path)
        rank = config.rank_of(module)
        draw = _key_for(key, path)
        a_shape, b_shape = (*batch, *k_shape, rank), (*batch, rank, *n_shape)
        if path.rpartition("/")[2] == "embedding":
            a, b = jnp.zeros(a_shape, jnp.float32), jax.random.normal(draw, b_shape, jnp.float32)
        else:
            # kaiming_uniform with a = sqrt(5) is U(-1/sqrt(K), 1/sqrt(K)).
            bound = 1.0 / math.sqrt(math.prod(k_shape))
            a = jax.random.uniform(draw, a_shape, jnp.float32, -bound, bound)
            b = jnp.zeros(b_shape, jnp.float32)
        adapters[path] = LoraWeights(a, b, config.scaling_of(module))
    for path in select_full(leaves, config.modules_to_save):
        leaf = leaves[path]
        if path in adapters:
            raise QloraError(f"{path} is both a target and in modules_to_save; choose one")
        if isinstance(leaf, QuantizedArray):
            raise QloraError(
                f"{path} is to be trained in full but is quantized: "
                "exclude it by the quantization policy"
            )
        adapters[path] = jnp.asarray(leaf, jnp.float32) if _is_array(leaf) else _abstract(leaf)
    return adapters


def attach(
    params: Any, adapters: Adapters, *, dropout: float = 0.0, key: jax.Array | None = None
) -> Any:
    """`params` with a LoraArray, or the trained array, at every path that `adapters` names.

    Nothing is copied. dropout: for training; with it `key` must be given, and should be a new one
    for every step: each weight, and each of stacked weights, then draws its own masks from it.
    Raises QloraError for a path that `params` lacks and for shapes that do not fit, listing all.
    """
    if dropout and key is None:
        raise QloraError("dropout needs a key")
    leaves = named_leaves(params)
    faults = [f"{path}: no such parameter" for path in adapters if path not in leaves]
    faults += [
        fault
        for path, adapter in adapters.items()
        if path in leaves and (fault := _misfit(path, leaves[path], adapter))
    ]
    if faults:
        raise QloraError("the adapters do not fit the parameters:\n  " + "\n  ".join(faults))

    def one(path: Any, leaf: Any) -> Any:
        name = path_str(path)
        adapter = adapters.get(name)
        if adapter is None:
            return leaf
        if not isinstance(adapter, LoraWeights):
            return adapter
        batch = leaf.shape[: adapter.a.ndim + adapter.b.ndim - 2 - leaf.ndim]
        scaling = jnp.asarray(adapter.scaling, jnp.float32)
        each = isinstance(adapter.scaling, tuple)
        scaling = scaling.reshape(batch) if each else jnp.broadcast_to(scaling, batch)
        keys = None
        if dropout and key is not None:
            keys = _key_for(key, name)
            keys = jax.random.split(keys, batch) if batch else keys
        return LoraArray(leaf, adapter.a, adapter.b, scaling, keys, dropout if dropout else 0.0)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_weight)


def count(adapters: Any) -> int:
    """How many numbers are trained; adapters may be abstract."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapters))


def named_leaves(params: Any) -> dict[str, Any]:
    """Path -> leaf, our weights being leaves."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)
    return {path_str(path): leaf for path, leaf in flat}


def _split_shape(path: str, leaf: Any, reading: Policy) -> tuple[tuple[int, ...], ...]:
    """(leading axes, contracted axes, output axes) of a weight."""
    if isinstance(leaf, LoraArray):
        raise QloraError(f"{path} already has an adapter; start from the tree without it")
    if isinstance(leaf, QuantizedArray):
        return leaf.batch_shape, leaf.k_shape, leaf.n_shape
    k, n = reading.axes_of(path)
    if leaf.ndim < k + n:
        raise QloraError(f"{path}: shape {leaf.shape} has no {k} contracted and {n} output axes")
    shape, lead = tuple(leaf.shape), leaf.ndim - k - n
    return shape[:lead], shape[lead : lead + k], shape[lead + k :]


def _misfit(path: str, leaf: Any, adapter: Any) -> str | None:
    shape = tuple(leaf.shape)
    if isinstance(leaf, LoraArray):
        return f"{path}: already has an adapter"
    if not isinstance(adapter, LoraWeights):
        if tuple(adapter.shape) == shape:
            return None
        return f"{path}: trained in full as {tuple(adapter.shape)}, the parameter is {shape}"
    batch = adapter.a.ndim + adapter.b.ndim - 2 - len(shape)
    a, b = tuple(adapter.a.shape), tuple(adapter.b.shape)
    fits = batch >= 0 and a[-1] == b[batch] and (*a[:-1], *b[batch + 1 :]) == shape
    fits = fits and a[:batch] == b[:batch]
    if isinstance(leaf, QuantizedArray):
        fits = fits and batch == len(leaf.batch_shape) and a[batch:-1] == leaf.k_shape
    if isinstance(adapter.scaling, tuple):
        fits = fits and len(adapter.scaling) == math.prod(shape[:batch])
    return None if fits else f"{path}: A {a} and B {b} do not multiply to the parameter's {shape}"


def _key_for(key: jax.Array, path: str) -> jax.Array:
    """A key of the path's own, whatever else is in the tree."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _abstract(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, jnp.float32)
