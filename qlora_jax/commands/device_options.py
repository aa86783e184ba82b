"""On which devices a command runs, of one process or several."""

import dataclasses
import os
import sys

import jax
from jax.sharding import Mesh

from qlora_jax.parallel import is_first, join, make_mesh, several


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """The mesh, and the other processes."""

    mesh: str | None = None
    """How many devices are along each axis, such as "fsdp=8" or "data=2,fsdp=2,tensor=2". The rest
    is the axis of -1, else fsdp or data, the first that is left out. data splits examples, fsdp
    examples and weights, tensor weights alone. Without it one device is used, by several processes
    all of theirs, along fsdp."""
    distributed: bool = False
    """This is one of several processes, each of which runs this command; under Slurm and Open MPI,
    and where JAX_COORDINATOR_ADDRESS is set, that is found out."""

    def open_mesh(self) -> Mesh | None:
        """Finds the other processes, of which the first alone prints from then on; the mesh."""
        if self.distributed or several():
            join()
            if not is_first():
                sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if self.mesh is None and jax.process_count() == 1:
            return None
        return make_mesh(self.mesh)
