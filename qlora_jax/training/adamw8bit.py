"""AdamW with 8-bit moments.

Source: 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861). Blocks, codes and the size
below which moments stay in fp32 are bitsandbytes', so that a state means the same there.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlora_jax.quant import dynamic

BLOCK = 256
"""Moments that share an absmax."""

MIN_SIZE = 4096
"""Parameters of fewer numbers (of each layer) keep fp32 moments: there is little to save."""


class Moment(NamedTuple):
    """A moment of a parameter, in blocks along its flattened axes, the last one padded.

    codes   uint8 [L, blocks, 256]; L is 1 but for three and more axes, of which the first is of
            layers: no block has numbers of two
    absmax  fp32 [L, blocks]
    """

    codes: jax.Array
    absmax: jax.Array


class ScaleByAdam8bitState(NamedTuple):
    """count: int32 []; mu, nu: of each parameter the first and second Moment, or fp32 arrays."""

    count: jax.Array
    mu: Any
    nu: Any


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """optax.adamw with moments of 8 bits (2.03 bytes for a parameter instead of 8).

    They are rounded to the dynamic map after an update was made from them, so that only what later
    steps remember is coarse: updates differ from those of 32 bits by a few percent.
    """
    return optax.chain(
        _scale_by_adam8bit(b1, b2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_adam8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    def init(params: Any) -> Any:
        def zero(x: jax.Array, signed: bool) -> Any:
            zeros = jnp.zeros_like(x, jnp.float32)
            return _quantize(_blocks(zeros), signed) if _is_quantized(x) else zeros

        return ScaleByAdam8bitState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(lambda x: zero(x, True), params),
            jax.tree.map(lambda x: zero(x, False), params),
        )

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count = jnp.asarray(optax.safe_increment(state.count))
        correction1, correction2 = (1 - decay ** count.astype(jnp.float32) for decay in (b1, b2))

        def one(grad: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
            quantized = _is_quantized(grad)
            g = grad.astype(jnp.float32)
            if quantized:
                g, mu, nu = _blocks(g), _dequantize(mu, True), _dequantize(nu, False)
            # In optax's order, in which XLA fuses multiplications and additions alike in every
            # program: so paged updates are equal to the bit.
            mu = (1 - b1) * g + b1 * mu
            nu = (1 - b2) * (g * g) + b2 * nu
            new = (mu / correction1) / (jnp.sqrt(nu / correction2) + eps)
            if quantized:
                new = _unblocked(new, grad.shape)
                mu, nu = _quantize(mu, True), _quantize(nu, False)
            return new.astype(grad.dtype), mu, nu

        leaves, tree = jax.tree.flatten(updates)
        moments = zip(leaves, *map(tree.flatten_up_to, (state.mu, state.nu)), strict=True)
        results = [one(*args) for args in moments]
        new, mu, nu = (tree.unflatten([r[i] for r in results]) for i in range(3))
        return new, ScaleByAdam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _layers(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 2 else 1


def _is_quantized(x: jax.Array) -> bool:
    return math.prod(x.shape) >= MIN_SIZE * _layers(x.shape)


def _blocks(x: jax.Array) -> jax.Array:
    """[L, blocks of a layer, 256], padded with zeros."""
    layers = _layers(x.shape)
    flat = x.reshape(layers, -1)
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % BLOCK)))
    return flat.reshape(layers, -1, BLOCK)


def _unblocked(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    layers = _layers(shape)
    return blocks.reshape(layers, -1)[:, : math.prod(shape) // layers].reshape(shape)


def _quantize(blocks: jax.Array, signed: bool) -> Moment:
    absmax = jnp.max(jnp.abs(blocks), axis=2)
    scaled = blocks * jnp.where(absmax > 0, 1 / absmax, 0.0)[:, :, None]
    return Moment(dynamic.encode(scaled, signed), absmax)


def _dequantize(moment: Moment, signed: bool) -> jax.Array:
    return dynamic.decode(moment.codes, signed) * moment.absmax[:, :, None]
