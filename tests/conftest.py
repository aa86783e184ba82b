"""Settings for every test: eight virtual CPU devices, strict dtype promotion, quick compilation.

Warnings are errors too (pyproject.toml).
"""

import atexit
import gc
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Each of pytest-xdist's workers has cores of its own: threads that wait for work do so by spinning,
# which would take the other workers' time.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    cores = sorted(os.sched_getaffinity(0))
    workers = min(int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), len(cores))
    os.sched_setaffinity(0, cores[worker % workers :: workers])

import jax
import numpy as np
import pytest
from jax._src import compiler

from tests import xla_options

jax.config.update("jax_num_cpu_devices", 8)

# Programs without the places in the source that their operations come from: 5% of the time.
jax.config.update("jax_include_full_tracebacks_in_locations", False)
jax.config.update("jax_traceback_in_locations_limit", 0)

# Tracing makes objects by the thousand that stay, and JAX adds work of its own to every collection:
# at Python's threshold of 700 this would be a tenth of the time.
gc.set_threshold(20_000, 20, 20)

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


QUICK = [("xla_cpu_use_fusion_emitters", False), ("xla_cpu_parallel_codegen_split_count", 1)]
OPTIMIZED = ("parity", "quant")
"""Folders whose programs are compiled as users' are: numbers to the bit, and others' results. Files
in them that hold neither are marked `quick`."""


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request: pytest.FixtureRequest):
    """Elsewhere a program runs once or twice on tiny arrays, and compiling it is most of a test's
    time: LLVM optimizes little, and XLA makes the code of its fusions in the older of its two ways,
    which takes a third as long, where it still has it (JAX 0.12 has not), and in one piece, as the
    core is one. XLA's own passes (fusion, sharding, memory) are the same, but that operations which
    stay alone are not wrapped."""
    marked = request.node.get_closest_marker("quick") is not None
    quick = marked or request.path.parent.name not in OPTIMIZED
    if jax.config.read("jax_disable_most_optimizations") != quick:
        jax.clear_caches()  # which do not tell programs compiled the other way apart
        jax.config.update("jax_disable_most_optimizations", quick)
    options_of_jax = compiler.get_compile_options
    settings = [setting for setting in QUICK if xla_options.has(*setting)]

    def options(*args: Any, **kwargs: Any) -> Any:
        found = options_of_jax(*args, **kwargs)
        # First: what a test asks of `jax.jit` itself comes later and wins.
        found.env_option_overrides = [*settings, *found.env_option_overrides]
        return found

    with pytest.MonkeyPatch.context() as patch:
        if quick:
            patch.setattr(compiler, "get_compile_options", options)
        yield


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """What bitsandbytes answered: see tests/goldens/make_bitsandbytes.py."""
    with np.load(Path(__file__).parent / "goldens" / "bitsandbytes.npz") as file:
        return dict(file)
