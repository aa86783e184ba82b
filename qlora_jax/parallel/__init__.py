"""Many devices: the mesh, how each parameter is split over it, several processes."""

from qlora_jax.parallel.distributed import is_first, join, several
from qlora_jax.parallel.layout import Layout, put_parameter, whole_here
from qlora_jax.parallel.mesh import make_mesh

__all__ = ["Layout", "is_first", "join", "make_mesh", "put_parameter", "several", "whole_here"]
