"""How activations lie on a mesh, for what the compiler cannot split by itself."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

from jax.sharding import Mesh

Names = tuple[str, ...]


class Split(NamedTuple):
    """Over which axes of `mesh` the examples of a batch are split, and over which heads are."""

    mesh: Mesh
    rows: Names
    heads: Names


_current: contextvars.ContextVar[Split | None] = contextvars.ContextVar("split", default=None)


@contextlib.contextmanager
def split_over(split: Split | None) -> Iterator[None]:
    """What is traced inside has its activations split so; None: not, or nobody knows."""
    token = _current.set(split)
    try:
        yield
    finally:
        _current.reset(token)


def current_split() -> Split | None:
    """That of the innermost `split_over`."""
    return _current.get()
