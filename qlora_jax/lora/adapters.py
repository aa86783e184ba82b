"""Making adapters for a parameter tree, putting them into it, counting them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.errors import QloraError
from qlora_jax.lora import dora, vera
from qlora_jax.lora.array import AdaptedArray, LoraWeights, is_weight, trained_fields
from qlora_jax.lora.config import LoraConfig, check_dropout
from qlora_jax.lora.targets import check_patterns, module_name, select_full, select_targets
from qlora_jax.lora.tree import is_abstract, key_for, like, named_leaves, split_shape
from qlora_jax.lora.vera import PROJECTIONS, VeraConfig, VeraProjections, VeraWeights
from qlora_jax.quant import Policy, QuantizedArray, path_str

Adapters = dict[str, Any]
"""Path of a parameter -> LoraWeights, VeraWeights, or a dense fp32 array for one that is trained in
full; and under `vera.PROJECTIONS` what all VeraWeights share.

Gradients and optimizer state are taken of what `trained_mask` says.
"""


def init(
    key: jax.Array,
    params: Any,
    config: LoraConfig | VeraConfig,
    *,
    axes: Mapping[str, tuple[int, int]] | None = None,
) -> Adapters:
    """Fresh adapters for `params`, with which it computes what it did: B (of VeRA b) is zero.

    A is kaiming-uniform with a = sqrt(5), as in LoRA and PEFT, or what `config.init` says; of an
    embedding A is zero and B standard normal, since it is A that is looked up. axes: as in
    `Policy`, for dense kernels that are not [..., K, N]; quantized ones know theirs. Only shapes of
    `params` are read, but of DoRA's weights and those trained in full also values; of abstract ones
    they are zeros. Raises QloraError for targets, and for patterns of ranks and alphas, that match
    nothing, and for an `init` that would change the base (`init_quantized` does that).
    """
    leaves = named_leaves(params)
    reading = Policy(axes=axes or {})
    targets = select_targets({path: tuple(leaf.shape) for path, leaf in leaves.items()}, config)
    shapes = {path: split_shape(path, leaves[path], reading) for path in targets}
    if isinstance(config, VeraConfig):
        adapters = vera.fresh(config, shapes)
    else:
        if config.changes_base:
            raise QloraError(
                f"init {config.init!r} takes A and B out of the dense weights: give those to "
                "lora.init_quantized, which returns the changed base too"
            )
        check_patterns(config, map(module_name, targets))
        adapters = {path: fresh(key, path, leaves[path], shapes[path], config) for path in targets}
    return adapters | in_full(leaves, adapters, config)


def fresh(
    key: jax.Array,
    path: str,
    base: Any,
    shape: tuple[tuple[int, ...], ...],
    config: LoraConfig,
) -> LoraWeights:
    """A new adapter of the parameter at `path`. shape: as of `split_shape`."""
    batch, k_shape, n_shape = shape
    module = module_name(path)
    rank = config.rank_of(module)
    draw = key_for(key, path)
    a_shape, b_shape = (*batch, *k_shape, rank), (*batch, rank, *n_shape)
    a, b = jnp.zeros(a_shape, jnp.float32), jnp.zeros(b_shape, jnp.float32)
    if path.rpartition("/")[2] == "embedding":
        b = jax.random.normal(draw, b_shape, jnp.float32)
    elif config.init == "gaussian":
        a = jax.random.normal(draw, a_shape, jnp.float32) / rank
    else:
        # kaiming_uniform with a = sqrt(5) is U(-1/sqrt(K), 1/sqrt(K)).
        bound = 1.0 / math.sqrt(math.prod(k_shape))
        a = jax.random.uniform(draw, a_shape, jnp.float32, -bound, bound)
    weights = LoraWeights(a, b, config.scaling_of(module))
    if not config.dora:
        return weights
    if is_abstract(base):
        zeros = jnp.zeros((*batch, *n_shape), jnp.float32)
        return LoraWeights(a, b, weights.scaling, zeros, zeros)
    return dora.with_magnitude(weights, base)


def in_full(
    leaves: Mapping[str, Any], adapters: Adapters, config: LoraConfig | VeraConfig
) -> Adapters:
    """fp32 copies of the parameters that `config.modules_to_save` names."""
    full: Adapters = {}
    for path in select_full(leaves, config.modules_to_save):
        if path in adapters:
            raise QloraError(f"{path} is both a target and in modules_to_save; choose one")
        if isinstance(leaves[path], QuantizedArray):
            raise QloraError(
                f"{path} is to be trained in full but is quantized: "
                "exclude it by the quantization policy"
            )
        full[path] = like(leaves[path])
    return full


def attach(
    params: Any, adapters: Adapters, *, dropout: float = 0.0, key: jax.Array | None = None
) -> Any:
    """`params` with a LoraArray, VeraArray, or the trained array, at every path of `adapters`.

    Nothing is copied. dropout: for training; with it `key` must be given, and should be a new one
    for every step: each weight, and each of stacked weights, then draws its own masks from it.
    Raises QloraError for a dropout outside [0, 1), and for a path that `params` lacks and shapes
    that do not fit, listing all.
    """
    check_dropout(dropout)
    if dropout and key is None:
        raise QloraError("dropout needs a key")
    leaves = named_leaves(params)
    projections = adapters.get(PROJECTIONS)
    by_path = {path: adapter for path, adapter in adapters.items() if path != PROJECTIONS}
    faults = [f"{path}: no such parameter" for path in by_path if path not in leaves]
    faults += [
        f"{path}: {fault}"
        for path, adapter in by_path.items()
        if path in leaves and (fault := _misfit(leaves[path], adapter, projections))
    ]
    if faults:
        raise QloraError("the adapters do not fit the parameters:\n  " + "\n  ".join(faults))

    def keys(path: str, batch: tuple[int, ...]) -> jax.Array | None:
        if not dropout or key is None:
            return None
        own = key_for(key, path)
        return jax.random.split(own, batch) if batch else own

    def one(path: Any, leaf: Any) -> Any:
        name = path_str(path)
        adapter = by_path.get(name)
        if isinstance(adapter, VeraWeights):
            assert projections is not None
            batch = leaf.shape[: adapter.lambda_d.ndim - 1]
            return adapter.on(leaf, projections, keys(name, batch), dropout)
        if isinstance(adapter, LoraWeights):
            batch = leaf.shape[: adapter.a.ndim + adapter.b.ndim - 2 - leaf.ndim]
            return adapter.on(leaf, keys(name, batch), dropout)
        return leaf if adapter is None else adapter

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_weight)


def trained_mask(adapters: Adapters) -> Any:
    """The adapters' tree with True for what is trained, False for what only goes with it.

    The latter are the norms of the base under DoRA, and VeRA's random matrices.
    """
    parts = (LoraWeights, VeraWeights, VeraProjections)

    def one(adapter: Any) -> Any:
        return trained_fields(adapter) if isinstance(adapter, parts) else True

    return jax.tree.map(one, adapters, is_leaf=lambda x: isinstance(x, parts))


def count(adapters: Any) -> int:
    """How many numbers are trained; adapters may be abstract."""
    sizes = jax.tree.map(
        lambda trained, leaf: math.prod(leaf.shape) if trained else 0,
        trained_mask(adapters),
        adapters,
    )
    return sum(jax.tree.leaves(sizes))


def _misfit(leaf: Any, adapter: Any, projections: VeraProjections | None) -> str | None:
    shape = tuple(leaf.shape)
    if isinstance(leaf, AdaptedArray):
        return "already has an adapter"
    if isinstance(adapter, VeraWeights):
        return adapter.misfit(leaf, projections)
    if not isinstance(adapter, LoraWeights):
        if tuple(adapter.shape) == shape:
            return None
        return f"trained in full as {tuple(adapter.shape)}, the parameter is {shape}"
    batch = adapter.a.ndim + adapter.b.ndim - 2 - len(shape)
    a, b = tuple(adapter.a.shape), tuple(adapter.b.shape)
    fits = batch >= 0 and a[-1] == b[batch] and (*a[:-1], *b[batch + 1 :]) == shape
    fits = fits and a[:batch] == b[:batch]
    if isinstance(leaf, QuantizedArray):
        fits = fits and batch == len(leaf.batch_shape) and a[batch:-1] == leaf.k_shape
    if isinstance(adapter.scaling, tuple):
        fits = fits and len(adapter.scaling) == math.prod(shape[:batch])
    if not fits:
        return f"A {a} and B {b} do not multiply to the parameter's {shape}"
    for name in ("magnitude", "base_norms"):
        vector = getattr(adapter, name)
        if vector is not None and tuple(vector.shape) != (*b[:batch], *b[batch + 1 :]):
            return f"{name} {tuple(vector.shape)} has not one number for each output of B {b}"
    return None
