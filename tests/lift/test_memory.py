"""What a lifted function does not compute and does not hold."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qlora_jax import lora
from qlora_jax.lift import lift
from tests.lift.oracle import equations, float_sizes, kernel, normal, prepare, results, shapes_made

LAYERS, K, N = 6, 64, 128
PARAMS = {"up": kernel(0, LAYERS, K, N), "down": kernel(1, LAYERS, N, K)}
AXES = {"up": (1, 1), "down": (1, 1)}
X = normal(2, 5, K)


def layer(x: jax.Array, w: Any) -> jax.Array:
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def scanned(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, p)[0]


def rematted(p: Any, x: jax.Array) -> jax.Array:
    step = jax.checkpoint(lambda x, w: (layer(x, w), None), prevent_cse=False)
    return jax.lax.scan(step, x, p)[0]


def loss_of(fn: Any, frozen: Any) -> Any:
    lifted = lift(fn, strict=True)
    return lambda adapters, x: jnp.sum(lifted(lora.attach(frozen, adapters), x) ** 2)


def stacked_floats(jaxpr: Any) -> list[Any]:
    """Floating arrays as large as a whole stack of dense weights."""
    return [
        aval
        for eqn in equations(jaxpr)
        for aval in results(eqn)
        if hasattr(aval, "dtype")
        and jnp.issubdtype(aval.dtype, jnp.floating)
        and aval.size >= LAYERS * K * N
    ]


@pytest.mark.parametrize("fn", (scanned, rematted))
def test_no_dense_stack_forward_or_backward(fn: Any) -> None:
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    loss = loss_of(fn, frozen)
    assert not stacked_floats(jax.make_jaxpr(loss)(adapters, X))
    assert not stacked_floats(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(adapters, X))


@pytest.mark.parametrize("fn", (scanned, rematted))
def test_backward_pass_keeps_no_copy_of_the_codes(fn: Any) -> None:
    """The backward pass's loop reads the codes that are there, not a stack saved on the way."""
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    jaxpr = jax.make_jaxpr(jax.grad(loss_of(fn, frozen)))(adapters, X)
    made = [
        aval
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "scan"
        for aval in results(eqn)
        if aval.dtype == jnp.uint8
    ]
    assert not made, made


def test_compiled_step_needs_less_than_one_dense_stack() -> None:
    """What XLA reserves beside arguments and results, gradients of A and B included."""
    layers, width = 16, 128
    params = {"w": kernel(0, layers, width, width)}
    frozen, adapters = prepare(params, {"w": (1, 1)}, "nf4", rank=2)
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    lifted = lift(fn, strict=True)

    def loss(adapters: Any, frozen: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(lifted(lora.attach(frozen, adapters), x) ** 2)

    step = jax.jit(jax.grad(loss)).lower(adapters, frozen, normal(2, 4, width)).compile()
    dense_stack = layers * width * width * 4
    analysis = step.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < dense_stack / 2


@pytest.mark.parametrize("base", ("nf4", "dense"))
@pytest.mark.parametrize("fn", (scanned, rematted))
def test_no_gradient_of_the_frozen_weight(fn: Any, base: str) -> None:
    """No product has the shape of a weight, so dW is never formed, not even for dA and dB."""
    frozen, adapters = prepare(PARAMS, AXES, base)
    jaxpr = jax.make_jaxpr(jax.grad(loss_of(fn, frozen), argnums=(0, 1)))(adapters, X)
    products = {
        tuple(results(eqn)[0].shape)
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "dot_general"
    }
    assert products
    assert not products & {(K, N), (N, K), (LAYERS, K, N), (LAYERS, N, K)}, products


def test_adapter_product_is_never_formed() -> None:
    """lift, unlike the oracle, adds no A B to the weight: with a dense base nothing is K x N."""
    frozen, adapters = prepare(PARAMS, AXES, "dense")
    attached = lora.attach(frozen, adapters)
    shapes = shapes_made(jax.make_jaxpr(lift(scanned, strict=True))(attached, X))
    assert not shapes & {(K, N), (N, K), (LAYERS, K, N), (LAYERS, N, K)}


def test_gradients_cover_the_adapters_alone() -> None:
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    gradients = jax.grad(loss_of(scanned, frozen))(adapters, X)
    assert jax.tree.structure(gradients) == jax.tree.structure(adapters)


def test_lookup_decodes_only_the_rows_asked_for() -> None:
    frozen, adapters = prepare({"table": normal(0, 512, 64)}, {"table": (1, 1)}, "nf4")
    fn = lift(lambda p, ids: p["table"][ids], strict=True)
    ids = jnp.asarray([[1, 2, 3], [500, 5, 0]])
    jaxpr = jax.make_jaxpr(fn)(lora.attach(frozen, adapters), ids)
    largest = max(float_sizes(jaxpr))
    assert largest <= max(ids.size * 64, 512 // 64 * 64)


def test_program_size_does_not_depend_on_depth() -> None:
    def count(layers: int) -> int:
        params = {"up": kernel(0, layers, K, N), "down": kernel(1, layers, N, K)}
        frozen, adapters = prepare(params, AXES, "nf4")
        return sum(1 for _ in equations(jax.make_jaxpr(loss_of(scanned, frozen))(adapters, X)))

    assert count(2) == count(8)
