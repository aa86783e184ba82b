"""Functions with derivatives of their own, between the weights and around them.

Their derivatives are wrong on purpose, so that a rule that was dropped on the way would show.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.lift.oracle import BASES, check, kernel, normal

PARAMS = {"up": kernel(0, 64, 96), "down": kernel(1, 96, 64)}
AXES = {"up": (1, 1), "down": (1, 1)}
X = normal(2, 5, 64)
WITH_ADAPTERS = ("nf4", "dense")


@jax.custom_vjp
def straight_through(x: jax.Array) -> jax.Array:
    return jnp.round(4 * x) / 4


straight_through.defvjp(lambda x: (straight_through(x), x), lambda x, g: (3 * g * jnp.cos(x),))


@jax.custom_jvp
def steep(x: jax.Array) -> jax.Array:
    return jnp.tanh(x)


@steep.defjvp
def _steep_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return steep(x), 5 * dx * jnp.sin(x)


ACTIVATIONS = {
    "custom_vjp": straight_through,
    "custom_jvp": steep,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_between_layers(name: str) -> None:
    """fp32 rounding may move an element across a step of `straight_through`: inputs avoid that."""
    act = ACTIVATIONS[name]
    check(
        lambda p, x: jnp.sin(x + act(x @ p["up"]) @ p["down"]), PARAMS, AXES, X, bases=WITH_ADAPTERS
    )


@pytest.mark.parametrize("name", ("custom_vjp", "custom_jvp"))
def test_activation_inside_scan_of_remat(name: str) -> None:
    act = ACTIVATIONS[name]

    def fn(p: Any, x: jax.Array) -> jax.Array:
        step = jax.checkpoint(lambda x, w: (act(x @ w), None))
        return jax.lax.scan(step, x, p["w"])[0]

    check(fn, {"w": kernel(0, 2, 64, 64)}, {"w": (1, 1)}, X, bases=("nf4",))


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda kept, g: (2 * g @ kept[1].T, 3 * kept[0].T @ g),
)


@jax.custom_jvp
def product_jvp(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


@product_jvp.defjvp
def _product_jvp(primals: Any, tangents: Any) -> Any:
    (x, w), (dx, dw) = primals, tangents
    return product_jvp(x, w), 2 * dx @ w + 3 * x @ dw


@pytest.mark.parametrize("f", (product, product_jvp), ids=("custom_vjp", "custom_jvp"))
def test_weight_into_a_function_with_its_own_derivative(f: Any) -> None:
    """Its rule holds for the weight too: what it says of dW reaches A and B."""
    fn = lambda p, x: jnp.tanh(f(jnp.tanh(f(x, p["up"])), p["down"]))  # noqa: E731
    check(fn, PARAMS, AXES, X, bases=BASES)


@pytest.mark.parametrize("where", ("scan", "remat", "jit of grad"))
def test_weight_into_a_custom_jvp_inside_other_rules(where: str) -> None:
    layer = lambda x, w: jnp.tanh(product_jvp(x, w))  # noqa: E731

    def fn(p: Any, x: jax.Array) -> jax.Array:
        if where == "scan":
            return jax.lax.scan(lambda x, w: (layer(x, w), None), x, p["w"])[0]
        if where == "remat":
            return jax.checkpoint(layer)(x, p["w"][0])
        return jax.jit(jax.grad(lambda x: jnp.sum(layer(x, p["w"][1]))))(x)

    check(fn, {"w": kernel(0, 2, 64, 64)}, {"w": (1, 1)}, X, bases=("nf4", "dense"))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def rows_product(ids: jax.Array, w: jax.Array, x: jax.Array, power: int) -> Any:
    """An integer argument, one that is no array, and an integer among the results."""
    return (x @ w) ** power, ids + 1


@functools.partial(rows_product.defjvp, symbolic_zeros=True)
def _rows_product_jvp(power: int, primals: Any, tangents: Any) -> Any:
    (ids, w, x), (d_ids, dw, dx) = primals, tangents
    assert type(d_ids) is jax.custom_derivatives.SymbolicZero
    out = rows_product(ids, w, x, power)
    zero = jax.custom_derivatives.SymbolicZero
    moved = jnp.zeros_like(out[0])
    if type(dx) is not zero:
        moved += 2 * dx @ w
    if type(dw) is not zero:
        moved += 3 * x @ dw
    return out, (moved, zero(jax.typeof(out[1]).to_tangent_aval()))


def test_custom_jvp_with_symbolic_zeros_and_integers() -> None:
    def fn(p: Any, x: jax.Array, ids: jax.Array) -> Any:
        return rows_product(ids, p["up"], x, 2)

    up = {"up": PARAMS["up"]}
    check(fn, up, {"up": (1, 1)}, X, jnp.arange(5), bases=BASES)


@jax.custom_jvp
def integer_product(ids: jax.Array, w: jax.Array) -> jax.Array:
    return ids.astype(w.dtype) @ w


@integer_product.defjvp
def _integer_product_jvp(primals: Any, tangents: Any) -> Any:
    (ids, w), (d_ids, dw) = primals, tangents
    assert d_ids.dtype == jax.dtypes.float0
    return integer_product(ids, w), 3 * ids.astype(w.dtype) @ dw


def test_custom_jvp_of_an_integer() -> None:
    ids = jnp.arange(64).reshape(1, 64)
    up = {"up": PARAMS["up"]}
    fn = lambda p, ids: integer_product(ids, p["up"])  # noqa: E731
    check(fn, up, {"up": (1, 1)}, ids, bases=("nf4", "dense"))


def test_weight_closed_over_by_a_custom_jvp_that_ignores_it() -> None:
    """jax.jit of a function with custom_jvp inside, the weight used beside it."""

    @jax.jit
    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        return steep(x) @ w

    check(lambda p, x: f(p["up"], x), {"up": PARAMS["up"]}, {"up": (1, 1)}, X, bases=("nf4",))
