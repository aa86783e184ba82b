"""Layers stacked on a leading axis and scanned, by Linen, NNX and jax.lax.scan."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from qlora_jax import lora
from qlora_jax.lift import lift
from tests.lift.oracle import BASES, check, equations, kernel, normal, prepare

LAYERS, WIDTH = 3, 64
WITH_ADAPTERS = ("nf4", "dense")


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        y = nn.LayerNorm(name="norm")(x)
        heads = nn.DenseGeneral((4, 24), name="up")(y)
        return x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="down")(nn.gelu(heads)), None


class LinenStack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = LinenBlock
        if self.remat:
            block = nn.remat(
                LinenBlock, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable
            )
        stack = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        return stack(name="layers")(x, None)[0]


LINEN_AXES = {"layers/up/kernel": (1, 2), "layers/down/kernel": (2, 1)}


@pytest.mark.parametrize("remat", (False, True))
def test_linen_scan(remat: bool) -> None:
    module, x = LinenStack(remat), normal(1, 2, 5, WIDTH)
    params = module.init(jax.random.key(0), x)["params"]
    assert params["layers"]["up"]["kernel"].shape == (LAYERS, WIDTH, 4, 24)
    check(lambda p, x: module.apply({"params": p}, x), params, LINEN_AXES, x, bases=WITH_ADAPTERS)


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 96, rngs=rngs)
        self.down = nnx.Linear(96, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class NnxStack(nnx.Module):
    def __init__(self, remat: bool, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> NnxBlock:
            return NnxBlock(rngs)

        self.layers = make(rngs)
        self.remat = remat

    def __call__(self, x: jax.Array) -> jax.Array:
        def call(layer: NnxBlock, x: jax.Array) -> jax.Array:
            return layer(x)

        inner = nnx.remat(call) if self.remat else call
        return nnx.scan(inner, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


NNX_AXES = {"layers/up/kernel": (1, 1), "layers/down/kernel": (1, 1)}


@pytest.mark.parametrize("remat", (False, True))
def test_nnx_scan(remat: bool) -> None:
    """nnx.scan and nnx.remat hand the layer's weights back as outputs: they must leave lazily."""
    graphdef, state = nnx.split(NnxStack(remat, nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    x = normal(1, 2, 5, WIDTH)
    check(lambda p, x: nnx.merge(graphdef, p)(x), params, NNX_AXES, x, bases=WITH_ADAPTERS)


STACK = {"up": kernel(0, LAYERS, WIDTH, 96), "down": kernel(1, LAYERS, 96, WIDTH)}
STACK_AXES = {"up": (1, 1), "down": (1, 1)}


def layer(x: jax.Array, w: Any) -> jax.Array:
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


@pytest.mark.parametrize("options", ({}, {"reverse": True}, {"unroll": 2}), ids=str)
def test_scan_over_weights(options: dict[str, Any]) -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, p, **options)[0]

    check(fn, STACK, STACK_AXES, normal(2, 5, WIDTH), bases=BASES)


def test_scan_over_inputs_with_a_constant_weight() -> None:
    """A recurrence: the weights are constants of the loop, the inputs its xs, the states its ys."""
    params = {"inward": kernel(0, 64, 96), "across": kernel(1, 96, 96)}

    def fn(p: Any, xs: jax.Array) -> Any:
        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jnp.tanh(x @ p["inward"] + h @ p["across"])
            return h, h

        return jax.lax.scan(step, jnp.zeros(96), xs)

    check(fn, params, {"inward": (1, 1), "across": (1, 1)}, normal(2, 4, 64), bases=WITH_ADAPTERS)


def test_scan_with_weights_as_constant_and_as_xs() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        shared = p["shared"]
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w + x @ shared), None), x, p["stack"])[0]

    params = {"shared": kernel(0, 64, 64), "stack": kernel(1, LAYERS, 64, 64)}
    check(fn, params, {"shared": (1, 1), "stack": (1, 1)}, normal(2, 5, 64), bases=WITH_ADAPTERS)


def test_nested_scans() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        def group(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)

        return jax.lax.scan(group, x, p["w"])[0]

    check(fn, {"w": kernel(0, 2, 3, 64, 64)}, {"w": (1, 1)}, normal(2, 5, 64), bases=WITH_ADAPTERS)


def test_weights_leave_a_scan_and_enter_another() -> None:
    """ys that are the weights themselves stay lazy, and may be consumed afterwards."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        x, again = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), w), x, p["w"])
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, again)[0]

    check(
        fn, {"w": kernel(0, LAYERS, 64, 64)}, {"w": (1, 1)}, normal(2, 5, 64), bases=WITH_ADAPTERS
    )


def test_cast_and_transposed_stack_is_scanned() -> None:
    """The whole stack is transposed and reshaped before the loop slices it."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        stack = jnp.swapaxes(p["w"].astype(jnp.float32), -1, -2)
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, stack)[0]

    check(
        fn, {"w": kernel(0, LAYERS, 64, 64)}, {"w": (1, 1)}, normal(2, 5, 64), bases=WITH_ADAPTERS
    )


def test_scan_of_remat_of_lax() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        step = jax.checkpoint(lambda x, w: (layer(x, w), None), prevent_cse=False)
        return jax.lax.scan(step, x, p)[0]

    check(fn, STACK, STACK_AXES, normal(2, 5, WIDTH), bases=WITH_ADAPTERS)


def test_weight_in_the_carry() -> None:
    """A weight that a loop carries along is right, lazily or made dense."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        def body(_: int, carry: Any) -> Any:
            x, w = carry
            return jnp.tanh(x @ w), w

        return jax.lax.fori_loop(0, 3, body, (x, p["w"]))[0]

    check(
        fn,
        {"w": kernel(0, 64, 64)},
        {"w": (1, 1)},
        normal(2, 5, 64),
        bases=WITH_ADAPTERS,
        strict=False,
    )


def test_options_of_scan_are_kept() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(step, x, p["w"], reverse=True, unroll=2)[0]

    params, axes, x = {"w": kernel(0, 4, 64, 64)}, {"w": (1, 1)}, normal(1, 5, 64)
    check(fn, params, axes, x, bases=("nf4",))
    frozen, adapters = prepare(params, axes, "nf4")
    program = jax.make_jaxpr(lift(fn, strict=True))(lora.attach(frozen, adapters), x)
    (scan,) = (eqn for eqn in equations(program) if eqn.primitive.name == "scan")
    assert (scan.params["reverse"], scan.params["unroll"]) == (True, 2)
