"""A mixture of experts in place of an MLP: each token goes through k of E of them.

Letters: B batch, T time, D model, F hidden of an expert, E experts, k experts of a token; P = BTk
pairs of a token and one of its experts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class Routing(NamedTuple):
    """Where each token goes.

    weights  fp32 [B, T, k], of a token's experts
    order    int32 [P], the pairs sorted by expert; pair i is that of token i // k
    places   int32 [P], where each pair is in that order
    sizes    int32 [E], pairs of each expert
    """

    weights: jax.Array
    order: jax.Array
    places: jax.Array
    sizes: jax.Array


class ExpertLinear(nnx.Module):
    """E linear layers without biases, kernel [E, in, out]."""

    def __init__(
        self,
        experts: int,
        features_in: int,
        features_out: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        init = nnx.initializers.normal(0.02)
        shape = (experts, features_in, features_out)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.dtype = dtype

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """x [P, in], sorted by expert as `sizes` [E] says -> [P, out]."""
        return jax.lax.ragged_dot(x.astype(self.dtype), self.kernel[...].astype(self.dtype), sizes)


class Experts(nnx.Module):
    """The MLPs, down(silu(gate(x)) * up(x)) each."""

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        linear = functools.partial(
            ExpertLinear, experts, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.gate_proj = linear(width, hidden)
        self.up_proj = linear(width, hidden)
        self.down_proj = linear(hidden, width)


class SparseMLP(nnx.Module):
    """The router and the experts.

    The work is that of the chosen experts: pairs are sorted by expert and multiplied in groups.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        experts: int,
        chosen: int,
        renormalize: bool,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        # Logits in fp32: a rounding there can send a token to another expert.
        self.router = nnx.Linear(
            width,
            experts,
            use_bias=False,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.experts = Experts(
            experts, width, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.chosen = chosen
        self.renormalize = renormalize

    def route(self, x: jax.Array) -> Routing:
        """x [B, T, D] -> the k most probable experts of each token.

        Their weights are their probabilities, made to sum to one if `renormalize`.
        """
        probabilities, weights, experts = self._choose(x)
        if self.renormalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        experts = experts.reshape(-1)
        order = jnp.argsort(experts)
        return Routing(
            weights=weights,
            order=order,
            places=jnp.argsort(order),
            sizes=jnp.bincount(experts, length=probabilities.shape[-1]),
        )

    def load(self, x: jax.Array, real: jax.Array | None) -> jax.Array:
        """x [B, T, D] -> fp32 [2, E]: how many tokens chose each expert, and the sum over tokens of
        its probability. Tokens where real [B, T] is false do not count."""
        probabilities, _, experts = self._choose(x)
        count = jnp.ones(x.shape[:2]) if real is None else real.astype(jnp.float32)
        chosen = jnp.sum(jax.nn.one_hot(experts, probabilities.shape[-1]), axis=-2)
        return jnp.sum(count[..., None] * jnp.stack([chosen, probabilities]), axis=(1, 2))

    def _choose(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> probabilities [B, T, E]; of the k greatest the values and the experts."""
        probabilities = jax.nn.softmax(self.router(x), axis=-1)
        return probabilities, *jax.lax.top_k(probabilities, self.chosen)

    def widen(self, x: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D] -> gate and up, [P, F] in the order of the pairs."""
        rows = x.reshape(-1, x.shape[-1])[routing.order // self.chosen]
        gate, up = self.experts.gate_proj, self.experts.up_proj
        return gate(rows, routing.sizes), up(rows, routing.sizes)

    def narrow(self, gate: jax.Array, up: jax.Array, routing: Routing) -> jax.Array:
        """gate and up [P, F] -> [B, T, D], the weighted sum over each token's experts.

        The weights come before the last product: their gradient then does not need its result.
        """
        weights = routing.weights.reshape(-1)[routing.order, None]
        hidden = jax.nn.silu(gate) * up * weights.astype(gate.dtype)
        rows = self.experts.down_proj(hidden, routing.sizes)[routing.places]
        pairs = rows.reshape(*routing.weights.shape, -1)
        return jnp.sum(pairs, axis=-2, dtype=jnp.float32).astype(pairs.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        routing = self.route(x)
        return self.narrow(*self.widen(x, routing), routing)


def load_balancing_loss(load: jax.Array, chosen: int) -> jax.Array:
    """E times the sum over experts of (part of the tokens that chose it, mean probability of it).

    load [2, E]: of `SparseMLP.load`, summed over layers; chosen: k. fp32 []: k where tokens are
    spread evenly, more where they are not. As transformers has it for these families
    (Switch Transformer, arXiv 2101.03961, equations 4 to 6, of all layers' tokens together).
    """
    tokens = jnp.maximum(jnp.sum(load[0]) / chosen, 1.0)
    return load.shape[1] * jnp.sum(load[0] * load[1]) / tokens**2
