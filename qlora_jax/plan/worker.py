"""The process that compiles: a question in JSON on every line of stdin, its answer on stdout.

    python -m qlora_jax.plan.worker

`compilers.environment` is the environment that it needs, `compiling.Compiler` its other end.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import compiler
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxlib import xla_client

from qlora_jax.errors import QloraError, reason
from qlora_jax.models.attention import use_attention
from qlora_jax.parallel import Layout, make_mesh
from qlora_jax.plan import abstract
from qlora_jax.plan.devices import CUDNN, Device, find
from qlora_jax.plan.workload import Workload
from qlora_jax.quant.implementations import use_implementation
from qlora_jax.training.estimate import DECODED
from qlora_jax.training.step import GPU_OPTIONS

EXHAUSTED = "RESOURCE_EXHAUSTED"
"""How XLA begins to say that a program does not fit; the TPU compiler says it of itself."""

# As the device would run it; memory is laid out before machine code is made, which then need not
# be good.
_OPTIONS = {"gpu": GPU_OPTIONS | {"xla_backend_optimization_level": 0}, "tpu": None}


def compile_step(workload: Workload, device: Device) -> dict[str, Any]:
    """Compiles the workload's step for a device and says what it takes of each.

    Bytes of temporaries, of arguments that are on the device, of what is not reused of the outputs;
    the footprint by formula; seconds; which code the 4-bit products and attention are. exhausted:
    the compiler's words, instead of bytes, where it found no room.
    """
    began = time.perf_counter()
    where = placement(workload, device)
    shapes = abstract.of_workload(workload)
    step = shapes.placed(where)
    attention = shapes.attention(device.attention)
    with use_attention(attention):
        lowered, chosen = _lower_first(step, device)
    estimated = shapes.estimate(where, decoded=DECODED[chosen], kernels=device.attention)
    answer: dict[str, Any] = {
        "implementation": chosen,
        "attention": attention,
        "estimate": dataclasses.asdict(estimated),
    }
    try:
        memory, _ = compile_lowered(lowered, device, _OPTIONS[device.compiler])
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith(EXHAUSTED):
            raise
        return answer | {"exhausted": reason(error), "seconds": time.perf_counter() - began}
    # Devices that are not here do not tell their kinds of memory, and of a GPU not all that lies in
    # the host's need be counted apart.
    host = max(0, estimated.optimizer_host - memory.host_argument_size_in_bytes)
    host = host if device.compiler == "gpu" else 0
    return answer | {
        "arguments": memory.argument_size_in_bytes - host,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "temporaries_host": memory.host_temp_size_in_bytes,
        "seconds": time.perf_counter() - began,
    }


def _lower_first(step: abstract.AbstractStep, device: Device) -> tuple[Any, str]:
    """The step's program with the first code of 4-bit products that takes it, and which that is."""
    *kernels, last = implementations(device)
    for implementation in kernels:
        try:
            with use_implementation(implementation):
                return lower(step.step, step.arguments, device), implementation
        except QloraError as error:
            if f"{implementation!r} cannot be used" not in str(error):
                raise  # else this step is not for these kernels, as a device would find out
    with use_implementation(last):
        return lower(step.step, step.arguments, device), last


def lower(step: Any, arguments: Any, device: Device) -> Any:
    """The program of a jitted step, of a GPU by its rules: see `placement`."""
    if device.compiler != "gpu":
        return step.lower(*arguments)
    with cudnn_version():
        return step.trace(*arguments).lower(lowering_platforms=("cuda",))


@contextlib.contextmanager
def cudnn_version() -> Iterator[None]:
    """JAX asks cuDNN for its version when it traces a call, which can be compiled without it."""
    version = CUDNN[0] * 10000 + CUDNN[1] * 100
    with mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", lambda: version):
        yield


def compile_lowered(
    lowered: Any, device: Device, options: Any = None
) -> tuple[Any, Callable[[], str]]:
    """(what the device's compiler says of the program's memory, what gives its text)."""
    if device.compiler != "gpu":
        program = lowered.compile(options)
        return program.memory_analysis(), program.as_text
    (gpu,) = device.devices()
    how = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=1,
        device_assignment=np.array([[0]]),
        env_options_overrides=options,
        backend=gpu.client,
    )
    program = gpu.client.compile(lowered.compiler_ir(), xla_client.DeviceList((gpu,)), how)
    return program.get_compiled_memory_stats(), lambda: program.hlo_modules()[0].to_string()


def placement(workload: Workload, device: Device) -> Sharding | Layout:
    """Where the step lies on the device, or on a mesh over its chips.

    A GPU that is not there has no memories to name, so that nothing could be said to lie in the
    host's: for it the step is lowered on a CPU, which has, and given to its compiler.
    """
    if device.compiler == "gpu":
        mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("x",))
        return NamedSharding(mesh, PartitionSpec())
    devices = device.devices()
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    return Layout.of(make_mesh(workload.mesh, devices), workload.config())


def implementations(device: Device) -> tuple[Any, ...]:
    """Which code of 4-bit products to try, the one that the device would choose first."""
    if device.compiler == "tpu":
        return ("pallas_tpu", "xla")
    try:
        from qlora_cuda import library  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return ("xla",)
    if not library.PATH.exists():
        return ("xla",)
    library.register(library.PATH)  # XLA asks for the handlers when it compiles
    return ("cuda", "xla")


def main() -> None:
    # Compilers print what they like; the answers get a stream of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = compile_step(
                Workload.from_json(question["workload"]), find(question["device"])
            )
        except QloraError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
