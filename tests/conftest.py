"""Settings for every test: eight virtual CPU devices, strict dtype promotion, quick compilation.

Warnings are errors too (pyproject.toml).
"""

import atexit
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# What several tests compile alike is compiled once. Each process has a folder of its own, empty at
# first: JAX does not write an entry at one stroke, so that another process could read half of it.
compiled = tempfile.TemporaryDirectory(prefix="qlora-jax-compiled-")
atexit.register(compiled.cleanup)
jax.config.update("jax_compilation_cache_dir", compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest):
    """No silent widening: bf16 + fp32 is an error unless the code says which it means.

    A test whose subject is not ours to change (optax, orbax) is marked `standard_promotion`.
    """
    mode = "standard" if request.node.get_closest_marker("standard_promotion") else "strict"
    with jax.numpy_dtype_promotion(mode):
        yield


OPTIMIZED = ("parity", "quant")
"""Folders whose programs are compiled as users' are: numbers to the bit, and others' results."""


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request: pytest.FixtureRequest):
    """Elsewhere LLVM optimizes little: a program runs once or twice on tiny arrays, and compiling
    it is most of a test's time. XLA's own passes (fusion, sharding, memory) are the same."""
    jax.config.update("jax_disable_most_optimizations", request.path.parent.name not in OPTIMIZED)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """What bitsandbytes answered: see tests/goldens/make_bitsandbytes.py."""
    with np.load(Path(__file__).parent / "goldens" / "bitsandbytes.npz") as file:
        return dict(file)
