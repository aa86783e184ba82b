"""Where a weight cannot stay lazy: an error by name if strict, else one line in the log."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qlora_jax import lora
from qlora_jax.errors import QloraError
from qlora_jax.lift import lift
from tests.lift.oracle import BASES, check, kernel, normal, prepare

PARAMS = {"mlp": {"up": {"kernel": kernel(0, 64, 96)}}, "head": {"kernel": kernel(1, 96, 64)}}
AXES = {"mlp/up/kernel": (1, 1), "head/kernel": (1, 1)}
X = normal(2, 5, 64)


def up(p: Any) -> jax.Array:
    return p["mlp"]["up"]["kernel"]


# Function, and the primitive that the message must name.
DENSIFYING: dict[str, tuple[Any, str]] = {
    "square": (lambda p, x: jnp.tanh(x @ up(p)) + jnp.sum(jnp.square(up(p))), "square"),
    "power": (lambda p, x: jnp.tanh(x @ up(p)) + jnp.sum(up(p) ** 3), "integer_pow"),
    "sum": (lambda p, x: jnp.tanh(x @ up(p)) + jnp.sum(up(p)), "reduce_sum"),
    "scaled": (lambda p, x: x @ (up(p) * 2.0), "mul"),
    "joined": (lambda p, x: x @ jnp.concatenate([up(p), up(p)], axis=1), "concatenate"),
    "part": (lambda p, x: x @ up(p)[:, :32], "slice"),
}


@pytest.mark.parametrize("name", DENSIFYING)
def test_strict_names_primitive_and_parameter(name: str) -> None:
    fn, primitive = DENSIFYING[name]
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    with pytest.raises(QloraError) as caught:
        lift(fn, strict=True)(lora.attach(frozen, adapters), X)
    assert primitive in str(caught.value)
    assert "mlp/up/kernel" in str(caught.value)
    assert "head" not in str(caught.value)


@pytest.mark.parametrize("name", DENSIFYING)
def test_without_strict_the_result_is_right(name: str) -> None:
    axes = {"mlp/up/kernel": (1, 1)}
    params = {"mlp": PARAMS["mlp"]}
    check(DENSIFYING[name][0], params, axes, X, bases=BASES, strict=False)


def records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [r for r in caplog.records if r.name == "qlora_jax.lift"]


def test_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """However often it is called or traced, and with which values."""
    fn, primitive = DENSIFYING["scaled"]
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    attached = lora.attach(frozen, adapters)
    lifted = lift(fn)
    with caplog.at_level(logging.WARNING, logger="qlora_jax.lift"):
        lifted(attached, X)
        lifted(attached, 2 * X)
        jax.jit(lifted)(attached, X)
        jax.grad(lambda x: jnp.sum(lifted(attached, x)))(X)
    (record,) = records(caplog)
    assert record.levelno == logging.WARNING
    assert primitive in record.getMessage() and "mlp/up/kernel" in record.getMessage()


def test_each_weight_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ (2.0 * up(p))) @ (3.0 * p["head"]["kernel"])

    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    with caplog.at_level(logging.WARNING, logger="qlora_jax.lift"):
        lift(fn)(lora.attach(frozen, adapters), X)
    messages = [record.getMessage() for record in records(caplog)]
    assert len(messages) == 2
    assert sum("mlp/up/kernel" in message for message in messages) == 1
    assert sum("head/kernel" in message for message in messages) == 1


def test_nothing_is_logged_when_nothing_is_densified(caplog: pytest.LogCaptureFixture) -> None:
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    fn = lambda p, x: jnp.tanh(x @ up(p)) @ p["head"]["kernel"]  # noqa: E731
    with caplog.at_level(logging.DEBUG, logger="qlora_jax.lift"):
        lift(fn)(lora.attach(frozen, adapters), X)
    assert not records(caplog)


@pytest.mark.parametrize("where", ("jit", "scan", "remat", "cond"))
def test_the_name_survives_nesting(where: str) -> None:
    def nested(p: Any, x: jax.Array) -> jax.Array:
        def f(w: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.tanh(x @ jnp.exp(w))

        w = up(p)
        if where == "jit":
            return jax.jit(f)(w, x)
        if where == "remat":
            return jax.checkpoint(f)(w, x)
        if where == "cond":
            return jax.lax.cond(x[0, 0] > 0, f, lambda w, x: jnp.tanh(x @ w), w, x)
        return jax.lax.scan(lambda c, x: (c, f(w, x)), 0.0, x)[1]

    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    with pytest.raises(QloraError, match=r"(?s)(exp.*mlp/up/kernel|mlp/up/kernel.*exp)"):
        lift(nested, strict=True)(lora.attach(frozen, adapters), X)
    check(
        nested, {"mlp": PARAMS["mlp"]}, {"mlp/up/kernel": (1, 1)}, X, bases=("nf4",), strict=False
    )


def test_stack_is_named_too() -> None:
    frozen, adapters = prepare({"layers": {"w": kernel(0, 3, 64, 64)}}, {"layers/w": (1, 1)}, "nf4")

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ (w + 1.0), None), x, p["layers"]["w"])[0]

    with pytest.raises(QloraError, match="layers/w"):
        lift(fn, strict=True)(lora.attach(frozen, adapters), X)
