"""Functions with derivatives of their own, between the weights and around them.

Their derivatives are wrong on purpose, so that a rule that was dropped on the way would show.
"""

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
    check(fn, PARAMS, AXES, X, bases=BASES, strict=False)


def test_weight_closed_over_by_a_custom_jvp_that_ignores_it() -> None:
    """jax.jit of a function with custom_jvp inside, the weight used beside it."""

    @jax.jit
    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        return steep(x) @ w

    check(lambda p, x: f(p["up"], x), {"up": PARAMS["up"]}, {"up": (1, 1)}, X, bases=("nf4",))
