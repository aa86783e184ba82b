"""Plain functions: what a weight may go through on its way to the product."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qlora_jax as qj
from qlora_jax import lora
from qlora_jax.lift import lift
from tests.lift.oracle import (
    BASES,
    RTOL,
    assert_close,
    check,
    compare,
    densify,
    equations,
    kernel,
    normal,
    prepare,
)

W = {"w": kernel(0, 96, 40)}
MATRIX = {"w": (1, 1)}
X = normal(1, 3, 5, 96)
G = normal(2, 3, 5, 40)

PRODUCTS: dict[str, tuple[Any, jax.Array]] = {
    "matmul": (lambda p, x: x @ p["w"], X),
    "vector": (lambda p, x: x @ p["w"], X[0, 0]),
    "weight_first": (lambda p, x: p["w"].T @ x, X[0].T),
    "transposed": (lambda p, g: g @ p["w"].T, G),
    "weight_first_transposed": (lambda p, g: p["w"] @ g, G[0].T),
    "transposed_twice": (lambda p, x: x @ p["w"].T.T, X),
    "tensordot": (lambda p, x: jnp.tensordot(p["w"], x, ((0,), (2,))), X),
    "reshaped_outputs": (lambda p, x: jnp.einsum("btk,khd->bhtd", x, p["w"].reshape(96, 4, 10)), X),
    "reshaped_inputs": (
        lambda p, x: jnp.einsum("bthk,hkn->btn", x.reshape(3, 5, 4, 24), p["w"].reshape(4, 24, 40)),
        X,
    ),
    "reshaped_both": (
        lambda p, x: jnp.einsum("bta,acd->btcd", x, p["w"].reshape(4, 24, 5, 8).reshape(96, 5, 8)),
        X,
    ),
    "permuted_inputs": (
        lambda p, x: jnp.einsum(
            "btkh,khn->btn", x.reshape(3, 5, 24, 4), p["w"].reshape(4, 24, 40).transpose(1, 0, 2)
        ),
        X,
    ),
    "unit_axes": (lambda p, x: jnp.einsum("btk,akcn->btacn", x, p["w"][None, :, None, :]), X),
    "squeezed": (lambda p, x: x @ jnp.squeeze(jnp.expand_dims(p["w"], 0), 0), X),
    "cast": (lambda p, x: x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32), X),
    "outer_of_inputs": (lambda p, x: jnp.einsum("btk,kn,b->btn", x, p["w"], x[:, 0, 0]), X),
    "used_twice": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, X),
    "precision": (lambda p, x: jnp.dot(x, p["w"], precision=jax.lax.Precision.HIGHEST), X),
    "copied": (lambda p, x: x @ jnp.array(p["w"], copy=True), X),
    "stop_gradient": (lambda p, x: x @ p["w"] + jax.lax.stop_gradient(x @ p["w"]), X),
    "stop_gradient_of_weight": (
        lambda p, x: x @ p["w"] + jnp.sin(x) @ jax.lax.stop_gradient(p["w"]),
        X,
    ),
    "barrier": (lambda p, x: jnp.matmul(*jax.lax.optimization_barrier((x, p["w"]))), X),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    fn, x = PRODUCTS[name]
    # Rounding the sum W + s AB to bf16 is what the dense function does; lift rounds the parts.
    rtol = 1e-2 if name == "cast" else RTOL
    check(fn, W, MATRIX, x, bases=BASES, rtol=rtol)


@pytest.mark.parametrize("base", ("nf4", "dense"))
@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_a_weight_behind_stop_gradient_has_none(base: str, dropout: float) -> None:
    frozen, adapters = prepare(W, MATRIX, base)
    key = jax.random.key(0)
    lifted = lift(lambda p, x: (x @ jax.lax.stop_gradient(p["w"])).sum(), strict=True)
    gradient, by_x = jax.jit(
        jax.grad(lambda a, x: lifted(lora.attach(frozen, a, dropout=dropout, key=key), x), (0, 1))
    )(adapters, X)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
    assert by_x.all()


def test_two_weights_share_an_input() -> None:
    params = {"gate": kernel(0, 96, 40), "up": kernel(1, 96, 40), "down": kernel(2, 40, 96)}
    axes = dict.fromkeys(params, (1, 1))

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    check(fn, params, axes, X, bases=("nf4", "dense"))


@pytest.mark.parametrize("shape", ((96, 1), (1, 40), (1, 1)), ids=str)
def test_single_row_or_column(shape: tuple[int, int]) -> None:
    x = normal(1, 5, shape[0])
    check(lambda p, x: x @ p["w"], {"w": normal(0, *shape)}, MATRIX, x, bases=("nf4", "dense"))
    check(
        lambda p, x: x @ p["w"].T,
        {"w": normal(0, *shape)},
        MATRIX,
        normal(1, 5, shape[1]),
        bases=("nf4", "dense"),
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("lead", ((0,), (2, 0)), ids=str)
def test_products_of_nothing_are_empty(lead: tuple[int, ...], base: str) -> None:
    frozen, adapters = prepare(W, MATRIX, base)
    there = lambda p, x: x @ p["w"]  # noqa: E731
    back = lambda p, g: g @ p["w"].T  # noqa: E731
    for fn, inner, outer in ((there, 96, 40), (back, 40, 96)):

        def total(a: Any, x: jax.Array, fn: Any = fn) -> tuple[jax.Array, jax.Array]:
            y = lift(fn, strict=True)(lora.attach(frozen, a), x)
            return y.sum(), y

        gradient, y = jax.grad(total, (0, 1), has_aux=True)(adapters, jnp.ones((*lead, inner)))
        assert y.shape == (*lead, outer) and gradient[1].shape == (*lead, inner)
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradient[0]))


HEADS = {"w": kernel(0, 96, 4, 10)}
STACK = {"w": kernel(0, 3, 96, 40)}


@pytest.mark.parametrize(
    "equation",
    ("btd,dhk->bthk", "btd,dhk->hbkt", "dhk,btd->khtb", "bthk,dhk->btd", "tkbh,dhk->dbt"),
)
def test_einsum_of_a_three_axis_kernel(equation: str) -> None:
    sizes = {"b": 2, "t": 5, "d": 96, "h": 4, "k": 10}
    left, right = equation.split("->")[0].split(",")
    letters = right if left == "dhk" else left
    x = normal(1, *(sizes[letter] for letter in letters))

    def fn(p: Any, x: jax.Array) -> jax.Array:
        operands = (p["w"], x) if left == "dhk" else (x, p["w"])
        return jnp.einsum(equation, *operands)

    check(fn, HEADS, {"w": (1, 2)}, x, bases=("nf4", "dense"))


@pytest.mark.parametrize(
    "equation", ("ebk,ekn->ebn", "bek,ekn->ben", "bk,ekn->bne", "ebn,ekn->kbe")
)
def test_einsum_over_stacked_weights(equation: str) -> None:
    """Experts: the stacked axis is a batch axis of the product, or a free one."""
    sizes = {"b": 5, "e": 3, "k": 96, "n": 40}
    x = normal(1, *(sizes[letter] for letter in equation.split(",")[0]))
    check(lambda p, x: jnp.einsum(equation, x, p["w"]), STACK, MATRIX, x, bases=BASES)


SLICES: dict[str, Any] = {
    "static": lambda w, i: w[1],
    "negative": lambda w, i: w[-1],
    "traced": lambda w, i: w[i],
    "dynamic_index": lambda w, i: jax.lax.dynamic_index_in_dim(w, i, 0, keepdims=False),
    "kept": lambda w, i: w[1:2][0],
    "range": lambda w, i: w[1:][1],
    "take": lambda w, i: jnp.take(w, i, axis=0),
    "dynamic_slice": lambda w, i: jax.lax.dynamic_slice_in_dim(w, i, 1, 0)[0],
}


@pytest.mark.parametrize("name", SLICES)
def test_one_layer_of_a_stack(name: str) -> None:
    take = SLICES[name]
    index = jnp.asarray(2)
    check(lambda p, x, i: x @ take(p["w"], i), STACK, MATRIX, X, index, bases=("nf4", "dense"))


def test_layers_unrolled_from_a_stack() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        for layer in range(3):
            x = x + jnp.tanh(x @ p["w"][layer])
        return x

    check(fn, {"w": kernel(0, 3, 64, 64)}, MATRIX, normal(1, 5, 64), bases=("nf4", "dense"))


def test_compute_in_bfloat16() -> None:
    """Output dtype and rounding are those of bf16; gradients of the fp32 adapters are fp32."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        half = jnp.tanh(x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16))
        return jnp.dot(half, p["w"].T.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    check(fn, W, MATRIX, X, bases=BASES, rtol=2e-2)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "uint32", "bfloat16"])
def test_inputs_of_another_type_than_the_weight(dtype: str) -> None:
    """Primitives take two types and multiply in the wider one: no weight is rounded to integers."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, size=(5, 96)), dtype)
    for base in BASES:
        frozen, adapters = prepare(W, MATRIX, base)
        got = lift(lambda p, x: x @ p["w"], strict=True)(lora.attach(frozen, adapters), x)
        expected = x.astype(jnp.float32) @ densify(frozen, adapters)["w"]
        assert got.dtype == jnp.float32
        assert_close(got, expected, RTOL, base)


@pytest.mark.standard_promotion
def test_complex_inputs_have_no_rule() -> None:
    frozen, _ = prepare(W, MATRIX, "frozen")
    x = X[0] * (1 + 2j)
    with pytest.raises(qj.QloraError, match="dot_general"):
        lift(lambda p, x: x @ p["w"], strict=True)(frozen, x)
    got = lift(lambda p, x: x @ p["w"])(frozen, x)
    np.testing.assert_allclose(got, x @ densify(frozen, {})["w"], rtol=1e-4, atol=1e-4)


def test_bfloat16_weights() -> None:
    params = {"w": W["w"].astype(jnp.bfloat16)}
    fn = lambda p, x: jnp.tanh(x.astype(p["w"].dtype) @ p["w"])  # noqa: E731
    check(fn, params, MATRIX, X, bases=BASES, rtol=2e-2)


def test_products_run_in_the_functions_dtype() -> None:
    """Nothing is computed wider than the function asks for, but for accumulation."""
    frozen, adapters = prepare(W, MATRIX, "nf4")
    fn = lift(lambda p, x: x @ p["w"].astype(jnp.bfloat16), strict=True)
    jaxpr = jax.make_jaxpr(fn)(lora.attach(frozen, adapters), X.astype(jnp.bfloat16))
    dots: list[Any] = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(dots) == 3  # the base, A and B
    assert {var.aval.dtype for eqn in dots for var in eqn.invars} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("base", BASES)
def test_weight_as_an_output(base: str) -> None:
    """A weight that a function returns untouched needs no densifying, and is still that weight."""
    frozen, adapters = prepare(W, MATRIX, base)
    attached = lora.attach(frozen, adapters)
    y, out = lift(lambda p, x: (x @ p["w"], p), strict=True)(attached, X)
    dense = densify(frozen, adapters)
    assert_close(y, X @ dense["w"], RTOL, "y")
    got = out["w"] if isinstance(out["w"], jax.Array) else out["w"].dequantize()
    assert_close(got, dense["w"], RTOL, "w")


@pytest.mark.parametrize("base", ("nf4", "dense"))
def test_arguments_of_any_kind(base: str) -> None:
    """Weights in tuples, lists and keyword arguments; a None; outputs of any structure."""
    frozen, adapters = prepare([W["w"], (kernel(3, 40, 96),)], {"0": (1, 1), "1/0": (1, 1)}, base)

    def fn(first: Any, x: jax.Array, *, second: Any, bias: Any = None) -> dict[str, Any]:
        y = jnp.tanh(x @ first) @ second[0]
        return {"y": y if bias is None else y + bias, "parts": (x, [y])}

    attached = lora.attach(frozen, adapters)
    dense = densify(frozen, adapters)
    got = lift(fn, strict=True)(attached[0], X, second=attached[1])
    assert_close(got, fn(dense[0], X, second=dense[1]), RTOL, "out")
    bias = normal(4, 96)
    got = lift(fn, strict=True)(attached[0], X, second=attached[1], bias=bias)
    assert_close(got, fn(dense[0], X, second=dense[1], bias=bias), RTOL, "out")


def test_python_values_reach_the_function_as_they_are() -> None:
    """A flag that the function branches on is no array, lifted or not."""
    frozen, adapters = prepare(W, MATRIX, "nf4")

    def fn(p: Any, x: jax.Array, *, train: bool, mode: str) -> jax.Array:
        y = x @ p["w"]
        return y * 2 if train and mode == "double" else y

    got = lift(fn, strict=True)(lora.attach(frozen, adapters), X, train=True, mode="double")
    assert_close(got, 2 * (X @ densify(frozen, adapters)["w"]), RTOL, "out")


def test_dense_trees_are_left_alone() -> None:
    fn = lambda p, x: jnp.sum(p["w"] ** 2) + jnp.sum(x @ p["w"])  # noqa: E731
    assert_close(lift(fn, strict=True)(W, X), fn(W, X), 1e-6, "out")


@pytest.mark.parametrize("base", ("nf4", "dense"))
def test_modules_trained_in_full(base: str) -> None:
    params = {"w": W["w"], "norm": jnp.ones(96)}
    frozen, adapters = prepare(params, MATRIX, base)
    adapters["norm"] = normal(5, 96)
    fn = lambda p, x: (x * p["norm"]) @ p["w"]  # noqa: E731
    lifted = lift(fn, strict=True)
    compare(
        lambda a, x: lifted(lora.attach(frozen, a), x),
        lambda a, x: fn(densify(frozen, a), x),
        adapters,
        X,
    )


def test_scaling_for_each_layer() -> None:
    """Stacked weights may have scalings of their own (an imported adapter)."""
    frozen, adapters = prepare(STACK, MATRIX, "nf4")
    adapters["w"] = lora.LoraWeights(adapters["w"].a, adapters["w"].b, (0.0, 1.0, 4.0))
    fn = lambda p, x: [x @ p["w"][i] for i in range(3)]  # noqa: E731
    got = lift(fn, strict=True)(lora.attach(frozen, adapters), X)
    assert_close(got, fn(densify(frozen, adapters), X), RTOL, "out")
    assert_close(got[0], X @ frozen["w"].dequantize()[0], RTOL, "layer without adapter")


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_arrangement_of_axes(data: st.DataObject) -> None:
    """Stacked, contracted and output axes, transposed at will, in one einsum over K or over N."""
    draw = data.draw
    lead = draw(st.integers(0, 1))
    k_ndim, n_ndim = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    letters = "e"[:lead] + "kl"[:k_ndim] + "mn"[:n_ndim]
    sizes = {"e": 2, "k": draw(st.sampled_from((1, 8, 16))), "l": 5, "m": 6, "n": 3, "b": 4}
    weight = normal(0, *(sizes[x] for x in letters))
    seen = "".join(draw(st.permutations(letters)))
    over_k = draw(st.booleans())
    shared = "e" if lead and draw(st.booleans()) else ""
    inner = "kl"[:k_ndim] if over_k else "mn"[:n_ndim]
    outer = "mn"[:n_ndim] if over_k else "kl"[:k_ndim]
    x_letters = "".join(draw(st.permutations("b" + inner + shared)))
    result = "".join(draw(st.permutations("b" + outer + "e"[:lead])))
    equation = f"{x_letters},{seen}->{result}"
    x = normal(1, *(sizes[c] for c in x_letters))

    def fn(p: Any, x: jax.Array) -> jax.Array:
        w = jnp.transpose(p["w"], [letters.index(c) for c in seen])
        return jnp.einsum(equation, x, w)

    frozen, adapters = prepare({"w": weight}, {"w": (k_ndim, n_ndim)}, "nf4")
    # One program for each: op by op, every shape of every operation would be compiled alone.
    got = jax.jit(lift(fn, strict=True))(lora.attach(frozen, adapters), x)
    want = jax.jit(lambda frozen, adapters, x: fn(densify(frozen, adapters), x))(
        frozen, adapters, x
    )
    size = np.abs(want).max()
    assert np.abs(got - want).max() <= RTOL * size, equation
