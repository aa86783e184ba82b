"""What lift must agree with: the plain function on dense weights, W + scaling * A B formed.

The weights of a test are named by `axes`: path -> (contracted axes, output axes). Nothing here uses
the library's own way of densifying or attaching, only QuantizedArray.dequantize, which has its own
tests against bitsandbytes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from qlora_jax import lora
from qlora_jax.lift import lift
from qlora_jax.quant import NF4, QuantizedArray, quantize

Axes = Mapping[str, tuple[int, int]]

BASES = ("nf4", "dense", "frozen")
"""4-bit weights with adapters, dense weights with adapters, 4-bit weights alone."""

RTOL = 2e-5
"""Of the largest element: fp32 sums of up to 512 terms in another order."""

SCALING = 1.5
RANK = 3


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jax.device_put(values.astype(np.float32))  # jnp.asarray compiles a program a shape


def kernel(seed: int, *shape: int, k: int = 1) -> jax.Array:
    """A random weight whose product keeps its input's size; `k`: how many axes are contracted."""
    return normal(seed, *shape, scale=1.0 / math.sqrt(math.prod(shape[-1 - k : -1])))


def is_leaf(x: Any) -> bool:
    return isinstance(x, QuantizedArray | lora.LoraArray)


def named(tree: Any) -> dict[str, Any]:
    """Path "a/b/c" -> leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def prepare(params: Any, axes: Axes, base: str, rank: int = RANK) -> tuple[Any, lora.Adapters]:
    """(frozen parameters, adapters with A and B both random) for one of BASES."""
    leaves = named(params)
    lost = set(axes) - set(leaves)
    assert not lost, f"the test names {lost}, the parameters are {list(leaves)}"

    def freeze(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if base == "dense" or name not in axes:
            return leaf
        return quantize(leaf, NF4(), name=name, axes=axes[name])

    frozen = jax.tree_util.tree_map_with_path(freeze, params)
    if base == "frozen":
        return frozen, {}
    adapters = {
        path: random_lora(leaves[path].shape, axes[path], rank, seed)
        for seed, path in enumerate(axes)
    }
    return frozen, adapters


def random_lora(
    shape: tuple[int, ...], axes: tuple[int, int], rank: int = RANK, seed: int = 0
) -> lora.LoraWeights:
    lead = len(shape) - sum(axes)
    k_shape, n_shape = shape[lead : lead + axes[0]], shape[lead + axes[0] :]
    a = normal(100 + seed, *shape[:lead], *k_shape, rank, scale=1 / math.sqrt(math.prod(k_shape)))
    b = normal(200 + seed, *shape[:lead], rank, *n_shape, scale=0.5)
    return lora.LoraWeights(a, b, SCALING)


def densify(params: Any, adapters: lora.Adapters) -> Any:
    """The tree with every weight dense and its adapter added."""

    def one(path: Any, leaf: Any) -> Any:
        weight = leaf.dequantize() if isinstance(leaf, QuantizedArray) else leaf
        adapter = adapters.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        return weight if adapter is None else add_low_rank(weight, adapter)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_leaf)


def add_low_rank(weight: jax.Array, adapter: Any) -> jax.Array:
    if not isinstance(adapter, lora.LoraWeights):
        return adapter
    a, b = adapter.a, adapter.b
    lead = weight.shape[: a.ndim + b.ndim - 2 - weight.ndim]
    matrix_a = a.reshape(*lead, -1, a.shape[-1])
    matrix_b = b.reshape(*lead, a.shape[-1], -1)
    scaling = jnp.broadcast_to(jnp.asarray(adapter.scaling, jnp.float32), lead)[..., None, None]
    product = (matrix_a @ matrix_b) * scaling
    return (weight.astype(jnp.float32) + product.reshape(weight.shape)).astype(weight.dtype)


def check(
    fn: Callable[..., Any],
    params: Any,
    axes: Axes,
    *inputs: Any,
    bases: Iterable[str],
    strict: bool = True,
    rtol: float = RTOL,
) -> None:
    """lift(fn) on lazy weights equals fn on dense ones: values, gradients of A, B and inputs.

    All of `bases` share one compiled oracle: fn with its gradient in W, and from that to A and B.
    """
    oracle = _value_and_gradients(lambda _, dense, *xs: fn(dense, *xs))
    lifted = lift(fn, strict=strict)
    ours = _value_and_gradients(
        lambda frozen, trained, *xs: lifted(lora.attach(frozen, trained), *xs)
    )
    for base in bases:
        frozen, adapters = prepare(params, axes, base)
        out, (by_weights, *by_inputs) = oracle(None, _densify(frozen, adapters), *inputs)
        want = (out, (_to_adapters(frozen, adapters, by_weights), *by_inputs))
        _assert_agree(ours(frozen, adapters, *inputs), want, rtol, base)


def compare(
    actual: Callable[..., Any], expected: Callable[..., Any], *args: Any, rtol: float = RTOL
) -> None:
    """Both functions give the same values, and the same gradients of all floating arguments."""
    got = _value_and_gradients(lambda _, *xs: actual(*xs))(None, *args)
    want = _value_and_gradients(lambda _, *xs: expected(*xs))(None, *args)
    _assert_agree(got, want, rtol, "compared")


@jax.jit
def _densify(frozen: Any, adapters: lora.Adapters) -> Any:
    return densify(frozen, adapters)


@jax.jit
def _to_adapters(frozen: Any, adapters: lora.Adapters, gradient: Any) -> lora.Adapters:
    """From the gradient in the dense weights to that in the adapters."""
    return jax.vjp(lambda a: densify(frozen, a), adapters)[1](gradient)[0]


def _value_and_gradients(f: Callable[..., Any]) -> Callable[..., Any]:
    """The jitted function of (frozen, *args) that gives f's outputs and gradients by *args.

    Gradients are those of the outputs' sum with fixed random weights; None for integers.
    """

    @jax.jit
    def run(frozen: Any, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def loss(floating: list[jax.Array]) -> Any:
            merged = list(leaves)
            for i, leaf in zip(places, floating, strict=True):
                merged[i] = leaf
            out = f(frozen, *jax.tree.unflatten(structure, merged))
            parts = [
                jnp.vdot(normal(i, *y.shape), y.astype(jnp.float32))
                for i, y in enumerate(jax.tree.leaves(out))
                if jnp.issubdtype(y.dtype, jnp.floating)
            ]
            return jnp.sum(jnp.stack(parts)), out

        gradients, out = jax.grad(loss, has_aux=True)([leaves[i] for i in places])
        spread: list[Any] = [None] * len(leaves)
        for i, gradient in zip(places, gradients, strict=True):
            spread[i] = gradient
        return out, jax.tree.unflatten(structure, spread)

    return run


def _assert_agree(got: Any, want: Any, rtol: float, which: str) -> None:
    """Every gradient of the adapters must be non-zero, or the comparison would show nothing."""
    assert_close(got[0], want[0], rtol, f"{which}: value")
    assert_close(got[1], want[1], rtol, f"{which}: gradient")
    for path, gradient in named(want[1][0]).items():
        assert np.abs(np.asarray(gradient)).max() > 0, f"the oracle's gradient of {path} is zero"


def assert_close(got: Any, want: Any, rtol: float, what: str) -> None:
    """Same structure, shapes and dtypes; elements within rtol of the largest one of their array."""
    assert jax.tree.structure(got) == jax.tree.structure(want), f"{what}: structures differ"
    for (path, x), (_, y) in zip(named(got).items(), named(want).items(), strict=True):
        where = f"{what} {path}"
        assert x.shape == y.shape, f"{where}: shape {x.shape}, expected {y.shape}"
        assert x.dtype == y.dtype, f"{where}: dtype {x.dtype}, expected {y.dtype}"
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.abs(x - y).max(initial=0.0)
        size = np.abs(y).max(initial=0.0)
        assert error <= rtol * size, f"{where}: off by {error:.3g} where the largest is {size:.3g}"


def equations(jaxpr: Any) -> Iterator[JaxprEqn]:
    """All equations of a jaxpr and of those inside its equations' parameters."""
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from equations(inner)


def inner_jaxprs(eqn: JaxprEqn) -> list[Any]:
    leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
    return [x for x in leaves if _is_jaxpr(x)]


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)


def results(eqn: JaxprEqn) -> list[Any]:
    """The types of what an equation makes: their shape, size and dtype."""
    return [var.aval for var in eqn.outvars]


def float_sizes(jaxpr: Any) -> set[int]:
    """How many elements each floating array that any equation makes has."""
    return {
        aval.size
        for eqn in equations(jaxpr)
        for aval in results(eqn)
        if hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)
    }


def shapes_made(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shapes of all arrays that any equation makes."""
    return {
        tuple(aval.shape)
        for eqn in equations(jaxpr)
        for aval in results(eqn)
        if hasattr(aval, "shape")
    }
