"""cond, switch and while with weights inside."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qlora_jax import lora
from qlora_jax.lift import lift
from tests.lift.oracle import RTOL, assert_close, check, compare, densify, kernel, normal, prepare

PARAMS = {"left": kernel(0, 64, 64), "right": kernel(1, 64, 64)}
AXES = {"left": (1, 1), "right": (1, 1)}
BOTH = {"w": kernel(0, 64, 64)}
X = normal(2, 5, 64)
WITH_ADAPTERS = ("nf4", "dense")


@pytest.mark.parametrize("taken", (True, False))
def test_cond_with_a_weight_as_operand(taken: bool) -> None:
    def fn(p: Any, x: jax.Array, flag: jax.Array) -> jax.Array:
        def yes(w: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.tanh(x @ w)

        return jax.lax.cond(flag, yes, lambda w, x: x @ w.T, p["w"], x)

    check(fn, BOTH, {"w": (1, 1)}, X, jnp.asarray(taken), bases=WITH_ADAPTERS)


def test_cond_with_a_weight_closed_over() -> None:
    """One branch uses the weight, the other does not."""

    def fn(p: Any, x: jax.Array, flag: jax.Array) -> jax.Array:
        return jax.lax.cond(flag, lambda: jnp.tanh(x @ p["w"]), lambda: x)

    check(fn, BOTH, {"w": (1, 1)}, X, jnp.asarray(True), bases=WITH_ADAPTERS)


def test_switch_between_weights() -> None:
    def fn(p: Any, x: jax.Array, which: jax.Array) -> jax.Array:
        branches = [lambda x: x @ p["left"], lambda x: x @ p["right"], lambda x: x @ p["left"].T]
        return sum(jax.lax.switch(i, branches, x) for i in which)

    check(fn, PARAMS, AXES, X, jnp.asarray([1, 0, 2]), bases=WITH_ADAPTERS)


@pytest.mark.parametrize("base", WITH_ADAPTERS)
def test_cond_inside_scan(base: str) -> None:
    """Every second layer of a stack is skipped."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            w, active = layer
            return jax.lax.cond(active, lambda: jnp.tanh(x @ w), lambda: x), None

        return jax.lax.scan(step, x, (p["w"], jnp.arange(4) % 2 == 0))[0]

    params = {"w": kernel(0, 4, 64, 64)}
    frozen, adapters = prepare(params, {"w": (1, 1)}, base)
    lifted = lift(fn, strict=True)
    compare(
        lambda a, x: lifted(lora.attach(frozen, a), x),
        lambda a, x: fn(densify(frozen, a), x),
        adapters,
        X,
    )


@pytest.mark.parametrize("base", WITH_ADAPTERS)
def test_cond_that_chooses_a_weight(base: str) -> None:
    """Right, whether the chosen weight stays lazy or not."""

    def fn(p: Any, x: jax.Array, flag: jax.Array) -> jax.Array:
        w = jax.lax.cond(flag, lambda: p["left"], lambda: p["right"])
        return x @ w

    frozen, adapters = prepare(PARAMS, AXES, base)
    for flag in (jnp.asarray(True), jnp.asarray(False)):
        got = lift(fn)(lora.attach(frozen, adapters), X, flag)
        assert_close(got, fn(densify(frozen, adapters), X, flag), RTOL, "out")


@pytest.mark.parametrize("base", ("nf4", "dense", "frozen"))
def test_while_loop(base: str) -> None:
    """Weights in body and condition; JAX has no reverse mode for it, with or without lift."""

    def fn(p: Any, x: jax.Array) -> Any:
        def proceed(carry: Any) -> jax.Array:
            count, x = carry
            return (count < 6) & (jnp.sum(x @ p["left"]) < 1e6)

        def body(carry: Any) -> Any:
            count, x = carry
            return count + 1, jnp.tanh(x @ p["right"]) + x

        return jax.lax.while_loop(proceed, body, (jnp.asarray(0), x))

    frozen, adapters = prepare(PARAMS, AXES, base)
    got = jax.jit(lift(fn, strict=True))(lora.attach(frozen, adapters), X)
    want = fn(densify(frozen, adapters), X)
    assert int(got[0]) == int(want[0]) == 6
    assert_close(got[1], want[1], RTOL, "out")


def test_fori_loop() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]), x)

    check(fn, BOTH, {"w": (1, 1)}, X, bases=WITH_ADAPTERS)


def test_fori_loop_that_indexes_a_stack() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)

    check(fn, {"w": kernel(0, 3, 64, 64)}, {"w": (1, 1)}, X, bases=("nf4",))
