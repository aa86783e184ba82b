"""The CUDA kernels of cuda_ext, compiled for a CPU that plays the GPU (simulator/), and registered
with XLA for the CPU under their own names: the same sources, handlers and Python.

On a GPU (JAX_PLATFORMS=cuda, qlora-jax-cuda installed) the tests run the kernels themselves."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import jax
import pytest
from qlora_cuda import library

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "cuda_ext" / "src"
SIMULATOR = Path(__file__).parent / "simulator"


def build(compiler: str) -> Path:
    """The simulated library, compiled where the sources have changed."""
    include = Path(jax.ffi.include_dir())
    files = sorted([*SOURCES.rglob("*.*"), *SIMULATOR.rglob("*.*")])
    flags = [compiler, "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-I{SIMULATOR}", f"-I{SOURCES}", f"-isystem{include}"]
    text = b"".join(file.read_bytes() for file in files) + " ".join(flags).encode()
    folder = ROOT / ".cache" / "simulator" / hashlib.sha256(text).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "libqlora_cuda.so"
    with (folder / "lock").open("w") as lock:  # other workers of a test run wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(flags, path)
    return path


def _compile(flags: list[str], path: Path) -> None:
    """The compiler is the first of `flags`."""
    flags = [*flags, "-include", str(SIMULATOR / "stream.h"), "-x", "c++", "-c"]
    objects = []
    running = []
    for source in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cc")]):
        objects.append(path.with_name(f"{source.name}.o"))
        running.append(subprocess.Popen([*flags, source, "-o", objects[-1]]))
    assert not any(process.wait() for process in running), "the simulated kernels do not compile"
    partial = path.with_suffix(".part")
    subprocess.run([flags[0], "-shared", "-o", partial, *objects], check=True)
    partial.rename(path)  # whole, or not there


ON_A_GPU = jax.default_backend() == "gpu"


@pytest.fixture(scope="session")
def kernels() -> Path:
    """Makes qlora_cuda's functions run, on a CPU simulated; gives the path of the library."""
    if ON_A_GPU:
        library.register(library.PATH)
        return library.PATH
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip(
            "the CUDA kernels are simulated with a C++ compiler (g++ or clang++): none here"
        )
    path = build(compiler)
    library.register(path, platform="cpu")
    return path
