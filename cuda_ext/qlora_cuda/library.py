"""The compiled library: finding it, and making its functions known to XLA."""

import ctypes
import functools
import re
from pathlib import Path

import jax

PATH = Path(__file__).with_name("libqlora_cuda.so")
TARGETS = ("qlora_matmul", "qlora_dequantize", "qlora_quantize")


def register(path: Path, platform: str = "CUDA") -> None:
    """Load the library at `path` and register its handlers; a broken one raises OSError."""
    library = _load(path)
    for target in TARGETS:
        jax.ffi.register_ffi_target(
            target, jax.ffi.pycapsule(getattr(library, target)), platform=platform
        )


def built_for(path: Path) -> tuple[int, int]:
    """The version (major, minor) of XLA's FFI whose headers the library was built with."""
    library = _load(path)
    return library.qlora_ffi_major(), library.qlora_ffi_minor()


def installed() -> tuple[int, int]:
    """The version of XLA's FFI in the jaxlib that is installed."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (
        re.search(rf"#define XLA_FFI_API_{part}\s+(\d+)", header) for part in ("MAJOR", "MINOR")
    )
    if major is None or minor is None:
        raise RuntimeError(f"jaxlib {jax.lib.__version__} does not say which FFI version it has")
    return int(major[1]), int(minor[1])


def mismatch(built: tuple[int, int], found: tuple[int, int]) -> str | None:
    """Why a library built for one version does not run in another; None where it does."""
    # XLA keeps older minor versions working, and knows nothing of newer ones.
    if built[0] == found[0] and built[1] <= found[1]:
        return None
    return (
        f"qlora-jax-cuda was built for version {built[0]}.{built[1]} of XLA's FFI, this jaxlib "
        f"{jax.lib.__version__} has {found[0]}.{found[1]}: build it again for the jaxlib that is "
        "installed, pip install --no-build-isolation --force-reinstall --no-deps ./cuda_ext"
    )


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))
