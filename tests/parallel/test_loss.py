"""The loss on a mesh: hidden states come to the head a chunk of each device's at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.mesh import collectives
from qlora_jax.models.loss import token_loss
from qlora_jax.parallel import make_mesh
from qlora_jax.parallel.mesh import ROWS

B, T, D, V, CHUNK = 8, 96, 16, 64, 4


@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,fsdp=4"])
def test_nothing_as_large_as_the_hidden_states_travels(spec):
    mesh = make_mesh(spec)
    hidden = jax.random.normal(jax.random.key(0), (B, T, D))
    weight = jax.random.normal(jax.random.key(1), (D, V))
    labels = jax.random.randint(jax.random.key(2), (B, T), -1, V)
    labels = jnp.where(labels < 0, -100, labels).at[3, 5:].set(-100)  # one part has fewer

    def loss(hidden, weight, parts=8):
        total, _ = token_loss(
            lambda w, rows: rows @ w, weight, hidden, labels, chunk=CHUNK, parts=parts
        )
        return total

    expected = jax.jit(jax.value_and_grad(lambda h, w: loss(h, w, parts=1)))(hidden, weight)
    placed = (
        jax.device_put(hidden, NamedSharding(mesh, PartitionSpec(ROWS))),
        jax.device_put(weight, NamedSharding(mesh, PartitionSpec(None, "fsdp"))),
    )
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*placed).compile()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        compiled(*placed),
        expected,
    )
    sizes = [math.prod(dims) for c in collectives(compiled.as_text()) for _, dims in c.shapes]
    assert 0 < max(sizes) < B * T * D / 2
