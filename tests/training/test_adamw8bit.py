"""8-bit AdamW: beside AdamW, and by a NumPy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as qj
from qlora_jax.quant import codebooks

pytestmark = pytest.mark.standard_promotion  # optax


def oracle(x, blocks_of, signed):
    """Moments as 8 bits remember them: nearest level of the table, times the block's absmax."""
    table = codebooks.dynamic_8bit(signed)
    blocks = blocks_of(x)
    absmax = np.abs(blocks).max(-1, keepdims=True)
    scaled = blocks / np.where(absmax > 0, absmax, 1)
    codes = np.abs(scaled[..., None] - table).argmin(-1)
    return (table[codes] * absmax).reshape(x.shape), absmax[..., 0]


def test_moments_are_rounded_block_by_block():
    rng = np.random.default_rng(0)
    params = {"layers": jnp.zeros((3, 32, 128)), "scale": jnp.zeros((64,))}
    grads = [
        {name: rng.normal(size=x.shape).astype(np.float32) for name, x in params.items()}
        for _ in range(3)
    ]
    optimizer = qj.adamw8bit(1.0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    mu, nu = np.zeros((3, 32, 128)), np.zeros((3, 32, 128))
    for step, g in enumerate(grads, start=1):
        updates, state = update(g, state, params)
        mu, nu = 0.9 * mu + 0.1 * g["layers"], 0.999 * nu + 0.001 * g["layers"] ** 2
        expected = -(mu / (1 - 0.9**step)) / (np.sqrt(nu / (1 - 0.999**step)) + 1e-8)
        # A moment between two levels may be rounded to either, and is remembered.
        wrong = ~np.isclose(updates["layers"], expected, rtol=1e-4, atol=1e-5)
        assert wrong.mean() < 1e-3
        mu, absmax = oracle(mu, lambda x: x.reshape(3, 16, 256), True)
        nu, _ = oracle(nu, lambda x: x.reshape(3, 16, 256), False)
        np.testing.assert_allclose(state[0].mu["layers"].absmax, absmax, rtol=1e-5)
    assert state[0].mu["layers"].codes.dtype == jnp.uint8
    assert state[0].mu["scale"].dtype == jnp.float32, "too small to round"
    held = sum(x.nbytes for x in jax.tree.leaves((state[0].mu, state[0].nu)))
    assert held == 2 * (3 * 32 * 128 * (1 + 4 / 256) + 64 * 4)


def test_a_last_block_may_be_short():
    params = {"w": jnp.zeros((3, 65, 67))}
    grads = {"w": jnp.full((3, 65, 67), 0.5)}
    optimizer = qj.adamw8bit(1.0)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -1, rtol=1e-4)
    assert state[0].mu["w"].absmax.shape == (3, 18)


def test_200_steps_beside_32_bits():
    """Stated error: the way that parameters went differs by 5% of its length, the loss at the end
    by 5% (measured 2.2% and 2.8%)."""
    rng = np.random.default_rng(0)
    shape, steps = (3, 64, 128), 200
    start, target = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    x = jnp.asarray(rng.normal(size=(steps, 3, 32, 64)), jnp.float32)

    def loss(w, x):
        return jnp.mean(jnp.einsum("lbk,lkn->lbn", x, w - target) ** 2)

    def run(optimizer):
        def step(carry, x):
            w, state = carry
            value, grads = jax.value_and_grad(loss)(w, x)
            updates, state = optimizer.update(grads, state, w)
            return (optax.apply_updates(w, updates), state), value

        (w, _), losses = jax.jit(lambda w: jax.lax.scan(step, (w, optimizer.init(w)), x))(start)
        return np.asarray(w), losses

    exact, losses = run(optax.adamw(1e-2, weight_decay=0.0))
    found, losses8 = run(qj.adamw8bit(1e-2))
    difference = np.linalg.norm(found - exact) / np.linalg.norm(exact - start)
    assert 0 < difference < 0.05
    assert losses[-1] < losses[0] / 4
    np.testing.assert_allclose(losses8[-1], losses[-1], rtol=0.05)
