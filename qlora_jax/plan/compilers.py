"""Finding the compilers of devices that are not here, and the environment they run in.

They run in a process of their own: a JAX that finds them beside itself would look for their
devices, and what a target cannot compile may abort the process.
"""

import importlib.util
import os
from pathlib import Path

from qlora_jax.errors import QloraError

VARIABLE = "QLORA_JAX_COMPILERS"
"""Environment variable: the folder that holds tpu/, gpu/ and cuda/, as `make compile` makes it."""

# Without these libtpu asks the machine which TPU it has, and waits for an answer.
_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is there to quarrel about
}

_PACKAGES = {
    "tpu": ("libtpu",),
    "gpu": (
        "jax-cuda13-plugin=={jax}",
        "jax-cuda13-pjrt=={jax}",
        "nvidia-cuda-nvcc",
        "nvidia-nvvm",
        "nvidia-cuda-crt",
    ),
}


def usual_folder() -> Path:
    """Where compilers are looked for if neither an option nor the environment names a folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "qlora-jax" / "compilers"


def environment(compiler: str, folder: str | Path | None = None) -> dict[str, str]:
    """Our environment with the compiler's packages importable and no device looked for.

    folder: holds `tpu`, `gpu` and, for the CUDA kernels, `cuda`, each as of pip install --target;
    None: that of QLORA_JAX_COMPILERS, then what is installed beside this library, then
    `usual_folder`. Raises QloraError where the compiler is in none of them: how to install it.
    """
    named = folder or os.environ.get(VARIABLE)
    home = Path(named).expanduser() if named else None
    places = [home / compiler] if home else [*_installed(compiler), usual_folder() / compiler]
    place = next((path for path in places if _is_there(compiler, path)), None)
    if place is None:
        raise QloraError(_missing(compiler, home))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    path = [str(place), env.get("PYTHONPATH", "")]
    if compiler == "tpu":
        env |= _TPU
    else:
        path.insert(0, str(place.with_name("cuda")))
        toolkit = _toolkit(place)
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={toolkit}".strip()
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def _installed(compiler: str) -> list[Path]:
    """The site-packages that have the compiler; nothing of it is imported."""
    spec = importlib.util.find_spec("libtpu" if compiler == "tpu" else "jax_plugins")
    return [Path(p).parent for p in (spec and spec.submodule_search_locations) or ()]


def _is_there(compiler: str, place: Path) -> bool:
    if compiler == "tpu":
        return (place / "libtpu" / "libtpu.so").exists()
    return any(place.glob("jax_plugins/xla_cuda*")) and _toolkit(place) is not None


def _toolkit(place: Path) -> Path | None:
    """What holds bin/ptxas, as NVIDIA's packages of CUDA 13 or 12 unpack."""
    return next((ptxas.parents[1] for ptxas in sorted(place.glob("nvidia/*/bin/ptxas"))), None)


def _missing(compiler: str, home: Path | None) -> str:
    import jax

    packages = " ".join(_PACKAGES[compiler]).format(jax=jax.__version__)
    where = home or usual_folder()
    return (
        f"the {compiler.upper()} compiler is not installed{f' in {home}' if home else ''}. It runs "
        f"without a {compiler.upper()}:\n"
        f"  pip install --no-deps --target {where / compiler} {packages}\n"
        f"or, where JAX may look for a {compiler.upper()} at every start, pip install "
        f"'qlora-jax[plan-{compiler}]'. --estimate does without"
    )
