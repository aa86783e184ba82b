"""Lazy: a weight on its way through a function, still in 4 bits and apart from its adapter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.lifting.view import View, in_storage_order, sizes
from qlora_jax.lora.array import map_stacked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lazy:
    """What stands for a dense array [*view.shape] of `dtype` while the function is walked.

    array: AdaptedArray or QuantizedArray. path: the parameter it came from, for messages.
    A pytree, so that it can enter and leave loops and branches.
    """

    array: Any
    view: View = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, array: Any, path: str) -> "Lazy":
        """A weight as it is stored: [batch..., *K axes, *N axes]."""
        view = View.whole(array.batch_shape, array.k_shape, array.n_shape)
        return cls(array, view, jnp.dtype(array.dtype), path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense array that the function takes this for."""
        return self.view.shape

    def seen_as(self, view: View) -> "Lazy":
        """The same weight, its axes arranged in another way."""
        return dataclasses.replace(self, view=view)

    def is_whole(self) -> bool:
        """Whether this is the weight as it is stored, unchanged."""
        whole = Lazy.of(self.array, self.path)
        return self.view == whole.view and self.dtype == whole.dtype

    def dense(self) -> jax.Array:
        """The array that this stands for."""
        return self.arrange(self.array.dequantize(self.dtype), self.view)

    def arrange(self, stored: jax.Array, view: View) -> jax.Array:
        """`stored`, an array with the atoms of `view` in storage order, as `view` sees it."""
        atoms = [atom for kind in ("batch", "k", "n") for atom in view.of_kind(kind)]
        seen = [atom for dim in view.dims for atom in dim]
        cut = stored.reshape(sizes(atoms))
        return cut.transpose([atoms.index(atom) for atom in seen]).reshape(view.shape)

    def batch_axis(self, place: int) -> int | None:
        """The leaves' axis that dimension `place` is, if it is exactly one stacked axis."""
        dim = self.view.dims[place]
        if len(dim) != 1 or dim[0].kind != "batch":
            return None
        return in_storage_order((a for d in self.view.dims for a in d), "batch").index(dim[0])

    def one_of_stack(self, place: int, index: Any) -> "Lazy":
        """The weight at `index` (clipped) of the stacked axis that dimension `place` is."""
        axis = self.batch_axis(place)
        assert axis is not None

        def one(leaf: Any) -> Any:
            return jnp.take(leaf, index, axis, mode="clip")

        view = self.view.drop(place)
        return dataclasses.replace(self, array=map_stacked(one, self.array), view=view)
