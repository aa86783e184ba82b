"""Stacked weights consumed by ragged_dot: rows in groups, each group times its own weight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import lora
from qlora_jax.errors import QloraError
from qlora_jax.lift import lift
from qlora_jax.lifting.grouped import block_rows
from tests.lift.oracle import BASES, check, equations, kernel, normal, prepare, results

E, K, N, M = 4, 64, 96, 40
SIZES = {
    "mixed": (11, 0, 20, 9),
    "one group has all": (0, 0, 40, 0),
    "rows that are in no group": (3, 0, 1, 8),
    "whole blocks": (16, 16, 0, 8),
}
UP, X = kernel(0, E, K, N), normal(1, M, K)
DOWN = kernel(2, E, N, K)


def mlp(p: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
    hidden = jnp.tanh(jax.lax.ragged_dot(x, p["up"], sizes))
    return jax.lax.ragged_dot(hidden, p["down"], sizes)


PARAMS = {"up": UP, "down": DOWN}
AXES = {"up": (1, 1), "down": (1, 1)}


def test_groups_of_any_sizes() -> None:
    """All by one program: sizes are known at run time only."""
    sizes = jnp.asarray(list(SIZES.values()), jnp.int32)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.map(lambda sizes: jax.lax.ragged_dot(x, p["up"], sizes), sizes)

    check(fn, {"up": UP}, {"up": (1, 1)}, X, bases=BASES)


def test_scanned_layers_of_experts_with_remat() -> None:
    sizes = jnp.asarray(SIZES["mixed"], jnp.int32)
    params = {"up": kernel(3, 2, E, K, N), "down": kernel(4, 2, E, N, K)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        @jax.checkpoint
        def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return x + mlp(layer, x, sizes), None

        return jax.lax.scan(step, x, p)[0]

    check(fn, params, AXES, X, bases=("nf4",))


def test_transposed_and_cast() -> None:
    """[E, N, K], as PyTorch stacks experts; and bf16 products."""
    sizes = jnp.asarray(SIZES["mixed"], jnp.int32)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, p["w"].transpose(0, 2, 1), sizes)

    check(fn, {"w": DOWN}, {"w": (1, 1)}, X, bases=("nf4",))

    def half(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16), sizes)

    check(half, {"w": UP}, {"w": (1, 1)}, X, bases=("nf4",), rtol=2e-2)


def test_inside_shard_map() -> None:
    """Rows split over devices, each with groups of its own."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    sizes = jnp.asarray([SIZES["mixed"], SIZES["whole blocks"]], jnp.int32) // 2

    def fn(p: Any, x: jax.Array) -> jax.Array:
        def local(p: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
            return jax.lax.ragged_dot(x, p["up"], sizes[0])

        specs = (spec(), spec("x"), spec("x"))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec("x"))(p, x, sizes)

    check(fn, {"up": UP}, {"up": (1, 1)}, X, bases=("nf4",))


def test_dropout_masks_differ_and_the_gradient_uses_the_same() -> None:
    sizes = jnp.asarray(SIZES["mixed"], jnp.int32)
    frozen, adapters = prepare({"up": UP}, {"up": (1, 1)}, "nf4")
    lifted = lift(lambda p, x: jax.lax.ragged_dot(x, p["up"], sizes), strict=True)
    direction = normal(5, M, K)

    @jax.jit
    def run(x: jax.Array, key: jax.Array) -> jax.Array:
        return lifted(lora.attach(frozen, adapters, dropout=0.5, key=key), x)

    key = jax.random.key(0)
    out, other = run(X, key), run(X, jax.random.key(1))
    assert jnp.array_equal(out, run(X, key))
    for start, size in ((0, 11), (11, 20), (31, 9)):
        assert not jnp.allclose(out[start : start + size], other[start : start + size])
    # Two blocks of one group: the same rows, and masks of their own.
    same = jnp.tile(X[:1], (M, 1))
    rows = run(same, key)[11:31]
    assert not jnp.allclose(rows[:8], rows[8:16])
    # Linear in x, so that the derivative along a direction is the function of it.
    gradient = jax.jit(jax.grad(lambda x: jnp.vdot(run(x, key), out)))(X)
    np.testing.assert_allclose(
        jnp.vdot(gradient, direction), jnp.vdot(run(direction, key), out), rtol=1e-4
    )


def test_neither_all_dense_weights_nor_gradients_of_one_are_made() -> None:
    sizes = jnp.asarray(SIZES["mixed"], jnp.int32)
    frozen, adapters = prepare(PARAMS, AXES, "nf4")

    def loss(adapters: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(lift(mlp, strict=True)(lora.attach(frozen, adapters), x, sizes) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(adapters, X)
    floats = [
        aval
        for eqn in equations(jaxpr)
        for aval in results(eqn)
        if hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)
    ]
    assert max(aval.size for aval in floats) < E * K * N
    # Each block adds to the gradients of A and B in place: no loop makes another array like them.
    stacked = {tuple(leaf.shape) for leaf in jax.tree.leaves(adapters)}
    makers = [
        eqn.primitive.name
        for eqn in equations(jaxpr)
        if any(tuple(aval.shape) in stacked for aval in results(eqn))
    ]
    assert set(makers) <= {"broadcast_in_dim", "scatter-add", "while", "jit", "pjit"}, makers


def test_only_groups_that_have_rows_are_decoded() -> None:
    """A group without rows may hold what it will: with NaN there, nothing else is touched."""
    frozen, _ = prepare({"up": UP}, {"up": (1, 1)}, "frozen")
    spoiled = frozen["up"].offset.at[1].set(jnp.nan)
    weight = dataclasses.replace(frozen["up"], offset=spoiled)
    lifted = lift(lambda w, x, sizes: jax.lax.ragged_dot(x, w, sizes), strict=True)
    sizes = jnp.asarray(SIZES["mixed"], jnp.int32)
    np.testing.assert_array_equal(lifted(weight, X, sizes), lifted(frozen["up"], X, sizes))
    assert jnp.isnan(lifted(weight, X, sizes.at[1].set(1))).any()


@pytest.mark.parametrize(
    ("rows", "groups", "block"),
    [(8, 128, 8), (4096 * 8, 128, 256), (65536 * 2, 8, 512), (16, 8, 16), (0, 4, 8)],
)
def test_rows_of_a_block(rows: int, groups: int, block: int) -> None:
    assert block_rows(rows, groups) == block


def test_what_has_no_rule_is_named() -> None:
    """Contracting the ragged axis itself: a product for each group."""
    frozen, _ = prepare({"w": kernel(0, M, N)}, {"w": (1, 1)}, "frozen")
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    sizes = jnp.asarray(SIZES["mixed"], jnp.int32)
    lifted = lift(lambda p, x: jax.lax.ragged_dot_general(x, p["w"], sizes, numbers), strict=True)
    with pytest.raises(QloraError, match="w: ragged_dot_general has no rule"):
        lifted(frozen, X)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("dtype", ["bool", "int8"])
def test_rows_of_whole_numbers(dtype: str) -> None:
    sizes = jnp.asarray(SIZES["mixed"], jnp.int32)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, size=(M, K)), dtype)
    frozen, _ = prepare({"up": UP}, {"up": (1, 1)}, "frozen")

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, p["up"], sizes, preferred_element_type=jnp.float32)

    dense = {"up": frozen["up"].dequantize()}
    got, expected = lift(fn, strict=True)(frozen, x), fn(dense, x.astype(jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
