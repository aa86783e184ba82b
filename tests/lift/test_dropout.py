"""Dropout on the input of A: which masks are drawn, and what they do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import lora
from qlora_jax.errors import QloraError
from qlora_jax.lift import lift
from tests.lift.oracle import RTOL, assert_close, densify, kernel, normal, prepare

K = 64
RATE = 0.25
PARAMS = {"one": kernel(0, K, 40), "two": kernel(1, K, 40)}
AXES = {"one": (1, 1), "two": (1, 1)}
X = normal(2, 3, 5, K)
KEY = jax.random.key(0)


def both(p: Any, x: jax.Array) -> Any:
    return x @ p["one"], x @ p["two"]


def run(frozen: Any, adapters: Any, rate: float, key: Any, fn: Any = both, x: Any = X) -> Any:
    attached = lora.attach(frozen, adapters, dropout=rate, key=key)
    return lift(fn, strict=True)(attached, x)


def transparent(*lead: int) -> tuple[Any, Any]:
    """Weights whose only effect is the mask: base zero, A and B the identity, scaling 2."""
    eye = jnp.broadcast_to(jnp.eye(K), (*lead, K, K))
    return {"w": jnp.zeros((*lead, K, K))}, {"w": lora.LoraWeights(eye, eye, 2.0)}


def times(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"]


@pytest.mark.parametrize("base", ("nf4", "dense"))
def test_same_key_same_result(base: str) -> None:
    frozen, adapters = prepare(PARAMS, AXES, base)
    first = run(frozen, adapters, RATE, KEY)
    assert_close(run(frozen, adapters, RATE, KEY), first, 0.0, "again")
    assert_close(jax.jit(lambda a: run(frozen, a, RATE, KEY))(adapters), first, RTOL, "jitted")


@pytest.mark.parametrize("base", ("nf4", "dense"))
def test_another_key_another_result(base: str) -> None:
    frozen, adapters = prepare(PARAMS, AXES, base)
    first = run(frozen, adapters, RATE, KEY)
    other = run(frozen, adapters, RATE, jax.random.fold_in(KEY, 1))
    assert all(bool(jnp.any(x != y)) for x, y in zip(first, other, strict=True))


def test_rate_zero_is_no_dropout() -> None:
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    without = lift(both, strict=True)(lora.attach(frozen, adapters), X)
    assert_close(run(frozen, adapters, 0.0, KEY), without, 0.0, "rate zero")
    assert_close(run(frozen, adapters, 0.0, None), without, 0.0, "no key")


def test_dropout_without_a_key_is_refused() -> None:
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    with pytest.raises(QloraError, match="key"):
        lora.attach(frozen, adapters, dropout=RATE)


def test_elements_are_dropped_or_scaled_up() -> None:
    """Each input of A is zero with probability RATE, or 1 / (1 - RATE) times itself."""
    frozen, adapters = transparent()
    x = normal(3, 50, 40, K)
    out = np.asarray(run(frozen, adapters, RATE, KEY, times, x)) / np.asarray(2.0 * x)
    dropped = np.isclose(out, 0.0)
    np.testing.assert_allclose(out[~dropped], 1 / (1 - RATE), rtol=1e-5)
    # 128,000 draws: the standard deviation of their mean is 0.0012.
    assert abs(dropped.mean() - RATE) < 0.006
    # Every token has its own mask.
    assert len(np.unique(dropped.reshape(-1, K), axis=0)) == 50 * 40


def test_expectation_is_the_result_without_dropout() -> None:
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    keys = jax.random.split(KEY, 4000)
    draws = jax.jit(jax.vmap(lambda key: run(frozen, adapters, RATE, key)[0]))(keys)
    want = (X @ densify(frozen, adapters)["one"],)
    mean, deviation = draws.mean(0), draws.std(0) / np.sqrt(len(keys))
    assert float(deviation.max()) > 0
    assert float(jnp.max(jnp.abs(mean - want[0]) / deviation)) < 5.5


def test_weights_draw_their_own_masks() -> None:
    """Two weights with one input and equal adapters see different masks."""
    eye = jnp.eye(K)
    frozen = {"a": jnp.zeros((K, K)), "b": jnp.zeros((K, K))}
    adapters = {name: lora.LoraWeights(eye, eye, 1.0) for name in frozen}
    a, b = run(frozen, adapters, RATE, KEY, lambda p, x: (x @ p["a"], x @ p["b"]))
    agree = float(jnp.mean((a == 0) == (b == 0)))
    independent = RATE**2 + (1 - RATE) ** 2
    assert abs(agree - independent) < 0.1


def test_a_weights_masks_do_not_depend_on_its_neighbours() -> None:
    """Adding an adapter elsewhere in the tree leaves the others' masks alone."""
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    alone = run(frozen, {"one": adapters["one"]}, RATE, KEY)[0]
    assert_close(run(frozen, adapters, RATE, KEY)[0], alone, 0.0, "one")


@pytest.mark.parametrize("how", ("scan", "unrolled"))
def test_stacked_layers_draw_their_own_masks(how: str) -> None:
    frozen, adapters = transparent(4)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        if how == "unrolled":
            return jnp.stack([x @ p["w"][i] for i in range(4)])
        return jax.lax.scan(lambda _, w: (None, x @ w), None, p["w"])[1]

    out = np.asarray(run(frozen, adapters, RATE, KEY, fn))
    masks = out.reshape(4, -1) != 0
    assert len(np.unique(masks, axis=0)) == 4


def test_scan_and_unrolled_layers_draw_the_same_masks() -> None:
    frozen, adapters = prepare({"w": kernel(0, 3, K, K)}, {"w": (1, 1)}, "nf4")

    def scanned(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    def unrolled(p: Any, x: jax.Array) -> jax.Array:
        for i in range(3):
            x = jnp.tanh(x @ p["w"][i])
        return x

    got = run(frozen, adapters, RATE, KEY, scanned)
    assert_close(got, run(frozen, adapters, RATE, KEY, unrolled), RTOL, "out")


def test_gradient_goes_through_the_same_mask() -> None:
    frozen, adapters = transparent()

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(run(frozen, adapters, RATE, KEY, times, x))

    out = run(frozen, adapters, RATE, KEY, times, jnp.ones_like(X))
    assert_close(jax.grad(total)(X), out, RTOL, "gradient")


@pytest.mark.parametrize("base", ("nf4", "dense"))
def test_remat_draws_the_same_mask_again(base: str) -> None:
    frozen, adapters = prepare(PARAMS, AXES, base)

    def gradient(fn: Any) -> Any:
        def loss(a: Any, x: jax.Array) -> jax.Array:
            return sum(jnp.sum(y**2) for y in run(frozen, a, RATE, KEY, fn, x))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(adapters, X)

    assert_close(gradient(jax.checkpoint(both)), gradient(both), RTOL, "gradient")


def test_the_base_path_is_not_dropped() -> None:
    """With B zero, dropout changes nothing."""
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    zero = {p: lora.LoraWeights(w.a, jnp.zeros_like(w.b), w.scaling) for p, w in adapters.items()}
    assert_close(run(frozen, zero, RATE, KEY), both(densify(frozen, {}), X), RTOL, "out")


def test_a_lookup_has_no_input_to_drop() -> None:
    """As in PEFT: an embedding's adapter is looked up whole."""
    frozen, adapters = prepare({"table": normal(0, 40, K)}, {"table": (1, 1)}, "nf4")
    ids = jnp.asarray([1, 2, 39])
    fn = lambda p, ids: p["table"][ids]  # noqa: E731
    want = densify(frozen, adapters)["table"][ids]
    assert_close(run(frozen, adapters, RATE, KEY, fn, ids), want, RTOL, "rows")


def test_convolution() -> None:
    frozen, adapters = prepare({"w": kernel(0, 3, 32, 12, k=2)}, {"w": (2, 1)}, "nf4")
    x = normal(1, 2, 9, 32)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=numbers)

    first = run(frozen, adapters, RATE, KEY, fn, x)
    assert_close(run(frozen, adapters, RATE, KEY, fn, x), first, 0.0, "again")
    assert bool(jnp.any(run(frozen, adapters, RATE, jax.random.key(1), fn, x) != first))
