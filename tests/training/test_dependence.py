"""What an output depends on, against functions whose answer is plain."""

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.training.dependence import Dependence, Rows, dependences

X = jnp.zeros((6, 4), jnp.float32)
TABLE = jnp.arange(6.0)[:, None]


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (lambda x: x * 2 + jnp.sqrt(jnp.abs(x)) / 3, Rows.OWN),
        (lambda x: x / (1e-6 + jnp.max(jnp.abs(x), axis=1, keepdims=True)), Rows.OWN),
        (lambda x: jnp.pad(x.reshape(6, 2, 2), ((0, 0), (0, 1), (0, 0))), Rows.OWN),
        (lambda x: jnp.concatenate([x, x[:, :1]], axis=1), Rows.OWN),
        (lambda x: jax.nn.relu(x) + jnp.arange(4.0), Rows.OWN),
        (lambda x: jnp.zeros_like(x), Rows.SAME),
        (lambda x: x / jnp.max(jnp.abs(x)), Rows.MIXED),
        (lambda x: jnp.cumsum(x, axis=0), Rows.MIXED),
        (lambda x: x[::-1], Rows.MIXED),
        (lambda x: x.reshape(3, 8).reshape(6, 4), Rows.MIXED),
        (lambda x: x + TABLE, Rows.MIXED),
        (lambda x: x + jnp.arange(6.0, dtype=jnp.float32)[:, None], Rows.MIXED),
        (lambda x: x + jax.random.normal(jax.random.key(0), x.shape), Rows.MIXED),
        (lambda x: jnp.concatenate([x[1:], x[:1]]), Rows.MIXED),
        (lambda x: x[:4] + x[:4, 0], Rows.MIXED),
    ],
)
def test_rows(function, rows):
    jaxpr = jax.make_jaxpr(function)(X)
    (found,) = dependences(jaxpr.jaxpr, [Dependence(frozenset({0}), Rows.OWN)])
    assert found.rows is rows


def test_sources():
    def function(a, b, c):
        return a + jax.jit(jnp.sin)(b), jax.jit(lambda x, y: (x, y * 2))(a, c)[1], jnp.ones(3)

    shapes = [jnp.zeros(3)] * 3
    jaxpr = jax.make_jaxpr(function)(*shapes)
    labels = [Dependence(frozenset({i}), Rows.OWN) for i in range(3)]
    assert [d.sources for d in dependences(jaxpr.jaxpr, labels)] == [{0, 1}, {2}, set()]
