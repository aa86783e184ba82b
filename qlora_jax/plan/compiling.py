"""Compiling a workload's step for a device that is not here, in a process of its own."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qlora_jax.errors import QloraError
from qlora_jax.plan import compilers
from qlora_jax.plan.devices import Device
from qlora_jax.plan.workload import Workload
from qlora_jax.training.footprint import Footprint


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler says of a step, in bytes of each device.

    footprint       None if the step does not fit and the compiler does not say by how much
    seconds         that it took
    implementation  the code that 4-bit products are, attention that of attention
    refusal         its words, if it found no room
    """

    footprint: Footprint | None
    seconds: float
    implementation: str
    attention: str
    refusal: str | None = None


class Compiler:
    """The compiler of a device, started when it is first asked. Use it in a `with` block.

    folder: see `compilers.environment`. compiled: all answers so far.
    """

    def __init__(self, device: Device, folder: str | Path | None = None) -> None:
        self._device = device
        self._environment = compilers.environment(device.compiler, folder)
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None
        self.compiled: list[Compiled] = []

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._errors.close()

    def __call__(self, workload: Workload, device: Device | None = None) -> Compiled:
        """Compiles the step, for another device of the same compiler if one is given.

        Raises QloraError for a workload that cannot be, and if the compiler breaks down.
        """
        process = self._start()
        assert process.stdin is not None and process.stdout is not None
        name = (device or self._device).name
        question = {"workload": workload.to_json(), "device": name}
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise QloraError(f"the compiler of {name} broke down:\n{self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise QloraError(answer["error"])
        result = _read(answer)
        self.compiled.append(result)
        return result

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "qlora_jax.plan.worker"],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        return self._process

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-5:])


def _read(answer: dict[str, Any]) -> Compiled:
    estimated = Footprint(**answer["estimate"])
    common = (answer["seconds"], answer["implementation"], answer["attention"])
    if "exhausted" in answer:
        return Compiled(None, *common, answer["exhausted"])
    # Padding of arguments, and outputs that nothing is reused for, such as metrics: small.
    extra = answer["arguments"] - estimated.arguments + answer["outputs"]
    return Compiled(estimated.measured(answer["temporaries"] + extra), *common)
