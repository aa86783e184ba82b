"""Measurements in processes of their own, so that each has the device to itself."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def ask(module: str, *arguments: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What `python -m module *arguments` prints last, a line of JSON. Failing, as for want of
    memory, is a result too: {"failed": the last line it said}."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, check=False, text=True, env=env)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": lines[-1][:300] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])
