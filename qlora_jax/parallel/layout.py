"""A model's arrays on a mesh: parameters, training state and batches, of one process or several.

Every process calls these alike, with the same values, and keeps what its own devices hold.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.errors import QloraError
from qlora_jax.parallel import rules
from qlora_jax.parallel.mesh import ROWS


@dataclasses.dataclass(frozen=True)
class Layout:
    """How everything of a training run lies on `mesh`; rules: as of `parallel.rules`."""

    mesh: Mesh
    rules: rules.Rules

    @classmethod
    def of(cls, mesh: Mesh, config: Any) -> "Layout":
        """That of a model's family; config: the model's."""
        return cls(mesh, rules.rules_for(config.model_type))

    def params(self, params: Any) -> Any:
        """Parameters on the mesh, every QuantizedArray knowing how it is split; shapes become
        shapes with shardings."""
        placed = rules.place(params, self.mesh, self.rules)
        return jax.tree.map(put, placed, rules.param_shardings(placed, self.mesh, self.rules))

    def state_shardings(self, state: Any) -> Any:
        """A NamedSharding for every leaf of a TrainState (arrays or shapes): the optimizer's state
        lies where the adapters do."""
        adapters = rules.adapter_shardings(state.adapters, self.mesh, self.rules)
        whole = NamedSharding(self.mesh, PartitionSpec())
        return dataclasses.replace(
            state,
            adapters=adapters,
            opt_state=rules.like_adapters(state.opt_state, state.adapters, adapters),
            step=whole,
            key=whole,
        )

    def build(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """The TrainState that `make(*arguments)` returns, made in parts: no device holds it whole.

        arguments: arrays on the mesh, or small ones that all processes have alike.
        """
        shardings = self.state_shardings(jax.eval_shape(make, *arguments))
        return jax.jit(make, out_shardings=shardings)(*arguments)

    def state(self, state: Any) -> Any:
        """A TrainState on the mesh."""
        return jax.tree.map(put, state, self.state_shardings(state))

    def batch(self, batch: Any, axis: int = 0) -> Any:
        """A batch, whole in every process, with its examples along `axis` (1 when accumulating, as
        leaves are [accumulate, B, ...] then): each device gets its own.

        Raises QloraError if they are no multiple of the devices along data and fsdp.
        """
        return jax.tree.map(lambda x: put(x, self.batch_sharding(x.shape, axis)), batch)

    def own_rows(self, count: int) -> list[int]:
        """Which of a batch's `count` examples devices of this process take."""
        places = self.batch_sharding((count,)).addressable_devices_indices_map((count,))
        return sorted({row for index in places.values() if index for row in range(count)[index[0]]})

    def own_batch(self, batch: Any, count: int, axis: int = 0) -> Any:
        """As `batch`, of which each process has its `own_rows(count)` alone."""

        def one(x: Any) -> Any:
            shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
            sharding = self.batch_sharding(shape, axis)
            return jax.make_array_from_process_local_data(sharding, x, shape)

        return jax.tree.map(one, batch)

    def batch_sharding(self, shape: tuple[int, ...], axis: int = 0) -> NamedSharding:
        """Of a leaf of such a batch."""
        rows, parts = shape[axis], self.row_parts
        if rows % parts:
            raise QloraError(
                f"a batch of {rows} examples cannot be split over data x fsdp = {parts} devices; "
                f"choose a multiple of {parts}"
            )
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, ROWS))

    @property
    def row_parts(self) -> int:
        """Into how many parts the examples of a batch are split."""
        return self.mesh.shape[ROWS[0]] * self.mesh.shape[ROWS[1]]


def put_parameter(mesh: Mesh, config: Any, path: str, leaf: Any) -> Any:
    """One parameter of a model on the mesh, as `Layout.params` puts it; for `load`'s `place`."""
    tree: Any = leaf
    for name in reversed(path.split("/")):
        tree = {name: tree}
    tree = Layout.of(mesh, config).params(tree)
    for name in path.split("/"):
        tree = tree[name]
    return tree


def put(x: Any, sharding: NamedSharding) -> Any:
    """`x` as `sharding` says; what lies so already is not moved. A shape gets the sharding."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    here = not isinstance(x, jax.Array) or x.is_fully_addressable
    if sharding.is_fully_addressable or not here:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index]))


def whole_here(tree: Any) -> Any:
    """Every leaf with all its parts in this process; all processes must call this together."""
    from jax.experimental import multihost_utils

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.tree.map(one, tree)
