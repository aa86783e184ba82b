"""The mixture of experts beside a sum over all of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax import lora
from qlora_jax.models.experts import SparseMLP, load_balancing_loss
from tests.lift.oracle import check, compare, named, normal

B, T, D, F, E, CHOSEN = 2, 9, 64, 96, 5, 2
X = normal(0, B, T, D)
EXPERTS = {f"experts/{name}/kernel": (1, 1) for name in ("gate_proj", "up_proj", "down_proj")}


def build(renormalize: bool) -> SparseMLP:
    return SparseMLP(
        width=D,
        hidden=F,
        experts=E,
        chosen=CHOSEN,
        renormalize=renormalize,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )


def make(renormalize: bool) -> tuple[Any, dict[str, Any]]:
    graph, state = nnx.split(build(renormalize))
    params = jax.tree.map(lambda x: 8 * x, nnx.to_pure_dict(state))
    return (lambda params, x: nnx.merge(graph, params)(x)), params


def all_experts(params: Any, x: jax.Array, renormalize: bool) -> jax.Array:
    """Every token through every expert, weighted by a matrix that is zero but for those chosen."""
    probabilities = jax.nn.softmax(x @ params["router"]["kernel"], axis=-1)
    least = jnp.sort(probabilities, axis=-1)[..., -CHOSEN, None]
    weights = jnp.where(probabilities >= least, probabilities, 0.0)
    if renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    kernels = {name: expert["kernel"] for name, expert in params["experts"].items()}
    gate = jnp.einsum("btd,edf->btef", x, kernels["gate_proj"])
    up = jnp.einsum("btd,edf->btef", x, kernels["up_proj"])
    out = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, kernels["down_proj"])
    return jnp.einsum("bted,bte->btd", out, weights)


@pytest.mark.parametrize("renormalize", (True, False))
def test_output_and_all_gradients(renormalize: bool) -> None:
    layer, params = make(renormalize)
    compare(layer, lambda p, x: all_experts(p, x, renormalize), params, X)


def test_quantized_and_adapted_experts() -> None:
    layer, params = make(renormalize=True)
    check(layer, params, EXPERTS, X, bases=("nf4",))


def test_one_token_uses_the_experts_it_chose() -> None:
    """Tokens alone give what they give together."""
    layer, params = make(renormalize=True)
    layer = jax.jit(layer)
    together = layer(params, X[:1, :3])
    alone = [layer(params, X[:1, i : i + 1]) for i in range(3)]
    assert jnp.allclose(jnp.concatenate(alone, axis=1), together, atol=1e-5)


def test_all_linear_adapts_every_expert_and_leaves_the_router() -> None:
    _, params = make(renormalize=True)
    adapters = lora.init(jax.random.key(0), params, lora.LoraConfig(rank=4))
    assert set(adapters) == set(EXPERTS)
    shapes = {name: leaf.shape for name, leaf in named(params).items()}
    for path, adapter in adapters.items():
        _, k, n = shapes[path]
        assert (adapter.a.shape, adapter.b.shape) == ((E, k, 4), (E, 4, n))
    assert lora.count(adapters) == E * 4 * 3 * (D + F)


def test_load_balancing_loss_of_known_loads() -> None:
    """Against the definition, at what is even and at what is not (chosen, probability)."""
    even = jnp.asarray([[6.0, 6, 6, 6], [3, 3, 3, 3]])
    assert load_balancing_loss(even, 2) == 2
    one_alone = jnp.asarray([[12.0, 0, 0, 0], [12, 0, 0, 0]])
    assert load_balancing_loss(one_alone, 1) == 4
    assert load_balancing_loss(jnp.zeros((2, 4)), 2) == 0


def test_load_of_the_tokens_that_are_real() -> None:
    _, params = make(renormalize=False)
    real = np.arange(B * T).reshape(B, T) % 3 > 0
    load = nnx.merge(nnx.graphdef(build(False)), params).load(X, jnp.asarray(real))
    probabilities = np.asarray(jax.nn.softmax(X @ params["router"]["kernel"], axis=-1))[real]
    chosen = np.argsort(probabilities, axis=-1)[:, -CHOSEN:]
    np.testing.assert_array_equal(load[0], np.bincount(chosen.reshape(-1), minlength=E))
    np.testing.assert_allclose(load[1], probabilities.sum(0), rtol=1e-5)
