"""Adapters taken out of the dense weights, which are changed, and quantized, thereby.

PiSSA (arXiv:2404.02948) puts the R largest singular values of W into A and B, and trains on what is
left of W. LoftQ (arXiv:2310.08659) puts into them the R largest of W - quantized W, so that the
4-bit model starts nearer to the dense one. Either way W = base + scaling * A B at first, but for
what quantization loses of the rest.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.errors import QloraError
from qlora_jax.lora import dora
from qlora_jax.lora.adapters import Adapters, in_full
from qlora_jax.lora.array import LoraWeights
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import check_patterns, module_name, select_targets
from qlora_jax.lora.tree import key_for, named_leaves, split_shape
from qlora_jax.quant import Policy, QuantConfig, QuantizedArray, path_str, quantize, quantize_tree


def init_quantized(
    key: jax.Array,
    params: Any,
    config: LoraConfig,
    quantization: QuantConfig | None,
    *,
    policy: Policy | None = None,
) -> tuple[Any, Adapters]:
    """(base, adapters) of dense `params`, the base quantized, for `config.init` pissa or loftq.

    quantization: None leaves the base dense. policy: which weights are quantized, and how the axes
    of all are read. The base must be kept with the adapters: with the weights that it was made of
    they compute something else. Weights are taken one by one, of stacked ones each on its own.

    Raises QloraError for another init (`quantize_tree` and `init` are all that those need), for
    targets that are embeddings or already quantized, and for loftq of a weight that is not to be
    quantized.
    """
    if not config.changes_base:
        raise QloraError(f"init {config.init!r} needs no dense weights: use quantize_tree and init")
    policy = policy or Policy()
    leaves = named_leaves(params)
    targets = select_targets({path: tuple(leaf.shape) for path, leaf in leaves.items()}, config)
    check_patterns(config, map(module_name, targets))
    base: dict[str, Any] = {}
    adapters: Adapters = {}
    for path in targets:
        leaf = leaves[path]
        selected = quantization if policy.selects(path, leaf.shape) else None
        if isinstance(leaf, QuantizedArray):
            raise QloraError(f"{path} is quantized already; init {config.init!r} needs it dense")
        if path.endswith("embedding"):
            raise QloraError(f"{path}: init {config.init!r} is of linear layers only")
        if config.init == "loftq" and selected is None:
            raise QloraError(f"{path} stays dense, so that loftq has nothing to make up for")
        shape = split_shape(path, leaf, policy)
        base[path], weights = _split(key_for(key, path), path, leaf, shape, config, selected)
        adapters[path] = dora.with_magnitude(weights, base[path]) if config.dora else weights

    def one(path: Any, leaf: Any) -> Any:
        return base.get(path_str(path), leaf)

    changed = jax.tree_util.tree_map_with_path(one, params)
    if quantization is not None:
        changed = quantize_tree(changed, quantization, policy)
    return changed, adapters | in_full(named_leaves(changed), adapters, config)


def _split(
    key: jax.Array,
    path: str,
    leaf: Any,
    shape: tuple[tuple[int, ...], ...],
    config: LoraConfig,
    quantization: QuantConfig | None,
) -> tuple[Any, LoraWeights]:
    """The base and the adapter of one parameter."""
    batch, k_shape, n_shape = shape
    module = module_name(path)
    rank, scaling = config.rank_of(module), config.scaling_of(module)
    k, n = math.prod(k_shape), math.prod(n_shape)
    if rank > min(k, n):
        raise QloraError(f"{path}: {k} x {n} has no {rank} singular values; choose a lower rank")
    parts = []
    for i, matrix in enumerate(jnp.asarray(leaf).reshape(-1, k, n)):
        if config.init == "loftq":
            assert quantization is not None
            part = loftq(matrix, rank, scaling, quantization, config.loftq_iter, name=path)
        else:
            _, _, iterations = config.init.partition("_niter_")
            part = pissa(matrix, rank, scaling, int(iterations or 0), jax.random.fold_in(key, i))
            if quantization is not None:
                part = (quantize(part[0], quantization, name=path), *part[1:])
        parts.append(part)
    base, a, b = jax.tree.map(lambda *xs: jnp.stack(xs).reshape(*batch, *xs[0].shape), *parts)
    if isinstance(base, QuantizedArray):
        base = dataclasses.replace(base, k_shape=k_shape, n_shape=n_shape)
    else:
        base = base.reshape(leaf.shape)
    a, b = a.reshape(*batch, *k_shape, rank), b.reshape(*batch, rank, *n_shape)
    return base, LoraWeights(a, b, scaling)


def pissa(
    w: jax.Array, rank: int, scaling: float, iterations: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(what is left, A, B) of w [K, N]: the `rank` largest singular values taken out of it.

    iterations: of a randomized decomposition (Halko et al., arXiv:0909.4061) from `key`, which is
    as good as exact after a few and much faster; 0: the exact one.
    """
    return _pissa(w, rank, scaling, iterations, key)


def loftq(
    w: jax.Array,
    rank: int,
    scaling: float,
    quantization: QuantConfig,
    iterations: int,
    *,
    name: str = "weight",
) -> tuple[QuantizedArray, jax.Array, jax.Array]:
    """(quantized, A, B) of w [K, N], whose sum quantized + scaling * A B is near to w.

    Each iteration quantizes what the A B before leaves of w, and takes A and B anew of w less that.
    """
    rest = w
    for _ in range(iterations):
        quantized = quantize(rest, quantization, name=name)
        a, b, rest = _factors_of_rest(w, quantized, rank, scaling)
    return quantized, a, b


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _pissa(w: jax.Array, rank: int, scaling: float, iterations: int, key: jax.Array) -> Any:
    exact = w.astype(jnp.float32)
    if iterations:
        a, b = _largest_by_iteration(exact, rank, scaling, iterations, key)
    else:
        a, b = _largest(exact, rank, scaling)
    return (exact - scaling * _dot(a, b)).astype(w.dtype), a, b


@functools.partial(jax.jit, static_argnums=(2, 3))
def _factors_of_rest(w: jax.Array, quantized: QuantizedArray, rank: int, scaling: float) -> Any:
    exact = w.astype(jnp.float32)
    a, b = _largest(exact - quantized.matrix(jnp.float32), rank, scaling)
    return a, b, (exact - scaling * _dot(a, b)).astype(w.dtype)


def _largest(w: jax.Array, rank: int, scaling: float) -> tuple[jax.Array, jax.Array]:
    """A and B whose product, times `scaling`, has the largest singular values of w [K, N]."""
    u, s, vh = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scaling)
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _largest_by_iteration(
    w: jax.Array, rank: int, scaling: float, iterations: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same, of w in the space that powers of w w^T bring random vectors into."""
    q, _ = jnp.linalg.qr(_dot(w, jax.random.normal(key, (w.shape[1], rank), jnp.float32)))
    for _ in range(iterations):
        q, _ = jnp.linalg.qr(_dot(w.T, q))
        q, _ = jnp.linalg.qr(_dot(w, q))
    a, b = _largest(_dot(q.T, w), rank, scaling)
    return _dot(q, a), b


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y, precision="highest")
