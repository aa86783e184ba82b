"""How a weight is seen after transposes and reshapes, as a static description.

A weight W [batch..., K..., N...] is cut into atoms, one for each axis (contracted and output axes
of size 1 have none). A view says which atoms make up each of its dimensions, in row-major order, so
that transposing permutes dimensions, and reshaping regroups atoms or cuts one in two.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

Kind = Literal["batch", "k", "n"]


@dataclasses.dataclass(frozen=True)
class Atom:
    """A piece of an axis of W.

    order: sorts the atoms of one kind as W stores them; for "k" and "n" it begins with the number
    of the axis among those of its kind.
    """

    order: tuple[int, ...]
    kind: Kind
    size: int

    def cut(self, outer: int) -> tuple["Atom", "Atom"]:
        """Two atoms in place of this one, the first of size `outer`."""
        return (
            Atom((*self.order, 0), self.kind, outer),
            Atom((*self.order, 1), self.kind, self.size // outer),
        )


Dim = tuple[Atom, ...]
"""Atoms of one dimension, slowest first; none for a dimension of size 1."""


def in_storage_order(atoms: Iterable[Atom], kind: Kind) -> Dim:
    """Those of one kind, slowest first."""
    return tuple(sorted((a for a in atoms if a.kind == kind), key=lambda a: a.order))


def sizes(atoms: Iterable[Atom]) -> tuple[int, ...]:
    """The shape of an array with one axis for each atom."""
    return tuple(atom.size for atom in atoms)


@dataclasses.dataclass(frozen=True)
class View:
    """The dimensions in which W is seen."""

    dims: tuple[Dim, ...]

    @classmethod
    def whole(cls, batch: Sequence[int], k_shape: Sequence[int], n_shape: Sequence[int]) -> "View":
        """W as it is stored."""
        kinds: tuple[tuple[Kind, Sequence[int]], ...] = (
            ("batch", batch),
            ("k", k_shape),
            ("n", n_shape),
        )
        return cls(
            tuple(
                (Atom((axis,), kind, size),) if size != 1 or kind == "batch" else ()
                for kind, shape in kinds
                for axis, size in enumerate(shape)
            )
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each dimension, the product of its atoms' sizes."""
        return tuple(math.prod(sizes(dim)) for dim in self.dims)

    def of_kind(self, kind: Kind) -> Dim:
        """All atoms of one kind, as W stores them."""
        return in_storage_order((atom for dim in self.dims for atom in dim), kind)

    def transpose(self, permutation: Sequence[int]) -> "View":
        """Dimension i of the result is dimension permutation[i] of this view."""
        return View(tuple(self.dims[i] for i in permutation))

    def with_unit_dims(self, ndim: int, kept: Sequence[int]) -> "View":
        """`ndim` dimensions: this view's at the places `kept`, size 1 elsewhere."""
        places = dict(zip(kept, self.dims, strict=True))
        return View(tuple(places.get(i, ()) for i in range(ndim)))

    def reshape(self, shape: Sequence[int]) -> "View | None":
        """The view of another shape, or None where that would cut across atoms.

        A stacked axis is never cut or joined: it must stay a dimension of its own.
        """
        left = [atom for dim in self.dims for atom in dim]
        dims: list[Dim] = []
        for size in shape:
            if left and left[0].kind == "batch" and left[0].size == size:
                dims.append((left.pop(0),))
                continue
            dim: list[Atom] = []
            while size > 1:
                if not left or left[0].kind == "batch":
                    return None
                if left[0].size > size and left[0].size % size == 0:
                    left[:1] = left[0].cut(size)
                if size % left[0].size:
                    return None
                size //= left[0].size
                dim.append(left.pop(0))
            dims.append(tuple(dim))
        return None if left else View(tuple(dims))

    def drop(self, place: int) -> "View":
        """Without the dimension at `place`."""
        return View(self.dims[:place] + self.dims[place + 1 :])

    def resized(self, place: int, size: int) -> "View":
        """With another size of the stacked axis at `place`."""
        (atom,) = self.dims[place]
        dim = (dataclasses.replace(atom, size=size),)
        return View((*self.dims[:place], dim, *self.dims[place + 1 :]))

    def stacked(self, size: int) -> "View":
        """With a new leading stacked axis, that the weight's leaves have in front too."""
        first = min((atom.order[0] for atom in self.of_kind("batch")), default=0)
        return View(((Atom((first - 1,), "batch", size),), *self.dims))
