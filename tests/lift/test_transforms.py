"""jit and vmap, inside a lifted function and around it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qlora_jax import lora
from qlora_jax.lift import lift
from tests.lift.oracle import (
    RTOL,
    assert_close,
    check,
    compare,
    densify,
    equations,
    kernel,
    normal,
    prepare,
    shapes_made,
)

PARAMS = {"up": kernel(0, 64, 96), "down": kernel(1, 96, 64)}
AXES = {"up": (1, 1), "down": (1, 1)}
X = normal(2, 5, 64)
BATCH = normal(3, 4, 5, 64)
WITH_ADAPTERS = ("nf4", "dense")


def mlp(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["up"]) @ p["down"]


def test_jit_inside() -> None:
    @jax.jit
    def up(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w)

    @functools.partial(jax.jit, static_argnames="times")
    def outer(p: Any, x: jax.Array, times: int) -> jax.Array:
        for _ in range(times):
            x = up(p["up"], x) @ p["down"]
        return x

    check(lambda p, x: outer(p, x, times=2), PARAMS, AXES, X, bases=WITH_ADAPTERS)


def test_weight_returned_from_jit() -> None:
    @jax.jit
    def prepared(p: Any) -> Any:
        return p["up"].astype(jnp.float32), p["down"].T

    def fn(p: Any, x: jax.Array) -> jax.Array:
        up, down = prepared(p)
        return jnp.tanh(x @ up) @ down.T

    check(fn, PARAMS, AXES, X, bases=WITH_ADAPTERS)


def test_one_jitted_function_with_weights_of_two_kinds() -> None:
    """Called with a 4-bit weight, then with a dense one of the same shape."""
    params = {"w": kernel(0, 64, 64), "plain": kernel(1, 64, 64)}

    @jax.jit
    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w)

    check(lambda p, x: f(p["plain"], f(p["w"], x)), params, {"w": (1, 1)}, X, bases=WITH_ADAPTERS)


def test_vmap_inside_over_the_batch() -> None:
    check(lambda p, x: jax.vmap(lambda x: mlp(p, x))(x), PARAMS, AXES, BATCH, bases=WITH_ADAPTERS)


def test_vmap_inside_over_stacked_weights() -> None:
    stack = {"w": kernel(0, 4, 64, 96)}
    fn = lambda p, x: jax.vmap(lambda w, x: jnp.tanh(x @ w))(p["w"], x)  # noqa: E731
    check(fn, stack, {"w": (1, 1)}, BATCH, bases=WITH_ADAPTERS)


@pytest.mark.parametrize("base", ("nf4", "dense", "frozen"))
def test_vmap_around_over_the_batch(base: str) -> None:
    frozen, adapters = prepare(PARAMS, AXES, base)
    lifted = lift(mlp, strict=True)
    compare(
        lambda a, x: jax.vmap(lifted, in_axes=(None, 0))(lora.attach(frozen, a), x),
        lambda a, x: jax.vmap(mlp, in_axes=(None, 0))(densify(frozen, a), x),
        adapters,
        BATCH,
    )


def test_vmap_around_over_stacked_weights() -> None:
    """Leaves of a stack may be mapped like any pytree, base, A, B and scaling together."""
    frozen, adapters = prepare({"w": kernel(0, 4, 64, 96)}, {"w": (1, 1)}, "nf4")
    fn = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    got = jax.vmap(lift(fn, strict=True))(lora.attach(frozen, adapters), BATCH)
    assert_close(got, jax.vmap(fn)(densify(frozen, adapters), BATCH), RTOL, "out")


def test_gradient_for_each_example() -> None:
    frozen, adapters = prepare(PARAMS, AXES, "nf4")

    def gradients(loss: Any) -> Any:
        return jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(adapters, BATCH)

    lifted = lift(mlp, strict=True)
    got = gradients(lambda a, x: jnp.sum(lifted(lora.attach(frozen, a), x) ** 2))
    want = gradients(lambda a, x: jnp.sum(mlp(densify(frozen, a), x) ** 2))
    assert_close(got, want, RTOL, "gradient")


def several_adapters(count: int) -> tuple[Any, Any]:
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    scales = 1.0 + jnp.arange(count, dtype=jnp.float32)
    stacked = jax.tree.map(lambda x: x[None] * scales[:, *(None,) * x.ndim], adapters)
    return frozen, stacked


@pytest.mark.parametrize("shared_input", (True, False))
def test_several_adapters_of_one_base(shared_input: bool) -> None:
    frozen, stacked = several_adapters(4)
    lifted = lift(mlp, strict=True)
    in_axes, x = (0, None if shared_input else 0), X if shared_input else BATCH
    compare(
        jax.vmap(lambda a, x: lifted(lora.attach(frozen, a), x), in_axes),
        jax.vmap(lambda a, x: mlp(densify(frozen, a), x), in_axes),
        stacked,
        x,
    )


def test_several_adapters_do_not_copy_the_base() -> None:
    """Neither codes nor a decoded weight get an axis of adapters, forward or backward."""
    count = 7  # no other axis has this size
    frozen, stacked = several_adapters(count)
    lifted = lift(mlp, strict=True)

    def loss(adapters: Any, x: jax.Array) -> jax.Array:
        each = jax.vmap(lambda a: lifted(lora.attach(frozen, a), x))(adapters)
        return jnp.sum(each**2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(stacked, X)
    shapes = shapes_made(jaxpr)
    assert (count, 5, 96) in shapes, "the test does not see the mapped products"
    forbidden = {64 * 96, 64 * 96 // 2}
    copies = [
        shape
        for shape in shapes
        if count in shape and _without(shape, count) in forbidden and 5 not in shape
    ]
    assert not copies, copies


def _without(shape: tuple[int, ...], count: int) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size // count


def test_second_call_does_not_trace_again() -> None:
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    traces = []

    def fn(p: Any, x: jax.Array) -> jax.Array:
        traces.append(1)
        return mlp(p, x)

    step = jax.jit(lift(fn, strict=True))
    attached = lora.attach(frozen, adapters)
    step(attached, X)
    first = len(traces)
    other = jax.tree.map(lambda x: x + 1, adapters)
    step(lora.attach(frozen, other), 2 * X)
    assert len(traces) == first
    assert step._cache_size() == 1


def test_lift_within_jit_within_lift() -> None:
    """A lifted function that is given dense tracers, or calls another lifted one, is harmless."""
    inner = jax.jit(lift(mlp, strict=True))
    check(lambda p, x: inner(p, jnp.sin(x)), PARAMS, AXES, X, bases=("nf4",))


def test_equations_without_weights_are_kept() -> None:
    """What no weight enters stays as it was traced: nothing is inlined or added."""
    frozen, adapters = prepare(PARAMS, AXES, "nf4")

    def fn(p: Any, x: jax.Array) -> jax.Array:
        x = jax.jit(jnp.sin)(x)
        return jax.lax.scan(lambda x, _: (jnp.cos(x), None), x @ p["up"], length=3)[0]

    jaxpr = jax.make_jaxpr(lift(fn, strict=True))(lora.attach(frozen, adapters), X)
    names = [eqn.primitive.name for eqn in equations(jaxpr)]
    assert names.count("scan") == 1 and names.count("sin") == 1 and names.count("cos") == 1


@pytest.mark.parametrize("base", ("nf4", "dense"))
def test_forward_mode_raises(base: str) -> None:
    """As lift's docstring says; it must not give a wrong number."""
    frozen, adapters = prepare(PARAMS, AXES, base)
    lifted = lift(mlp, strict=True)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: lifted(lora.attach(frozen, adapters), x), (X,), (X,))
