"""Several processes that train together: who the others are, and which one speaks."""

import os
from collections.abc import Mapping
from typing import Any

import jax

from qlora_jax.errors import QloraError, reason

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables by which a launcher that JAX does not know says who is who."""

_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""Variables of launchers that JAX knows, each the number of processes it has started."""


def several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment says that this process is one of several.

    That of Slurm's srun, of Open MPI, and a coordinator's address do; on a TPU pod and in GKE
    nothing does that a single machine would not have too, so that it has to be asked for.
    """
    sizes = (environment.get(name, "") for name in _SIZES)
    return ADDRESS in environment or any(size.isdecimal() and int(size) > 1 for size in sizes)


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Finds the other processes of the run and waits for them; before JAX has looked for devices.

    On TPU pods, in GKE, under Slurm and Open MPI `jax.distributed` finds them by itself; elsewhere
    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID
    say it. Raises QloraError where they cannot be found.
    """
    if jax.distributed.is_initialized():
        return
    options: dict[str, Any] = {}
    if ADDRESS in environment:
        numbers = {"num_processes": COUNT, "process_id": NUMBER}
        given = {key: environment[name] for key, name in numbers.items() if name in environment}
        if given and (len(given) < 2 or not all(text.isdecimal() for text in given.values())):
            raise QloraError(
                f"{ADDRESS} is set, so {COUNT} and {NUMBER} must be whole numbers, not "
                f"{environment.get(COUNT)!r} and {environment.get(NUMBER)!r}"
            )
        options = {"coordinator_address": environment[ADDRESS]}
        options |= {key: int(text) for key, text in given.items()}
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        raise QloraError(
            f"the other processes of this run cannot be found ({reason(error)}); start all of them "
            f"by one launcher, or set {ADDRESS} (host:port of the first), {COUNT} and {NUMBER} "
            "for each"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0
