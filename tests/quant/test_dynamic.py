"""Dynamic 8-bit codes by arithmetic, against the table."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant import codebooks, dynamic


@pytest.mark.parametrize("signed", [True, False])
def test_every_level(signed):
    table = codebooks.dynamic_8bit(signed)
    codes = jnp.arange(256, dtype=jnp.uint8)
    assert len(np.unique(table)) == 256
    np.testing.assert_allclose(dynamic.decode(codes, signed), table, rtol=2.5e-7)
    np.testing.assert_array_equal(dynamic.encode(jnp.asarray(table), signed), codes)


@pytest.mark.parametrize("signed", [True, False])
def test_every_number_gets_the_nearest_level(signed):
    table, rng = codebooks.dynamic_8bit(signed), np.random.default_rng(0)
    x = np.concatenate(
        [rng.uniform(-1 if signed else 0, 1, 50_000), 10 ** rng.uniform(-8, 0, 50_000)]
    )
    x = x.astype(np.float32)
    found = np.asarray(dynamic.decode(dynamic.encode(jnp.asarray(x), signed), signed))
    nearest = table[np.abs(x[:, None] - table[None]).argmin(1)]
    # Between two levels that are equally near, fp32 rounding decides.
    np.testing.assert_allclose(np.abs(found - x), np.abs(nearest - x), rtol=0, atol=2e-7)
    assert np.mean(~np.isclose(found, nearest, rtol=1e-6, atol=0)) < 1e-4
