"""Settings for every test: eight virtual CPU devices, strict dtype promotion.

Warnings are errors too (pyproject.toml).
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest):
    """No silent widening: bf16 + fp32 is an error unless the code says which it means.

    A test whose subject is not ours to change (optax, orbax) is marked `standard_promotion`.
    """
    mode = "standard" if request.node.get_closest_marker("standard_promotion") else "strict"
    with jax.numpy_dtype_promotion(mode):
        yield


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """What bitsandbytes answered: see tests/goldens/make_bitsandbytes.py."""
    with np.load(Path(__file__).parent / "goldens" / "bitsandbytes.npz") as file:
        return dict(file)
