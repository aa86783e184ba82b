"""The mesh: devices along three axes, and how a command line names their sizes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from qlora_jax.errors import QloraError

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
"""data: examples are split, weights repeated; fsdp: both are split, and a weight is gathered, in 4
bits, for its product; tensor: weights are split, and products with them. Outermost first, so that
neighbours, which have the fastest links, share `tensor`."""

ROWS = (DATA, FSDP)
"""The axes over which the examples of a batch are split."""


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=2,fsdp=4" -> {"data": 2, "fsdp": 4}; -1: whatever is left of the devices.

    Raises QloraError for what is no such list.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise QloraError(f"mesh {text!r}: the axes are {', '.join(AXES)}, not {name!r}")
        if name in sizes:
            raise QloraError(f"mesh {text!r}: {name} is given twice")
        try:
            size = int(number)
        except ValueError:
            size = 0
        if size < 1 and size != -1:
            raise QloraError(
                f"mesh {text!r}: {name} must be a number of devices, or -1 for what is left, not "
                f"{number!r}"
            )
        sizes[name] = size
    return sizes


def complete(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The size of every axis, their product being `devices`.

    What the given ones leave is the axis of size -1, else fsdp, else data, the first that is not
    given. Raises QloraError where they leave no whole number, or something and no axis for it.
    """
    named = ", ".join(f"{name}={size}" for name, size in sizes.items())
    for name, size in sizes.items():
        if name not in AXES or (size < 1 and size != -1):
            raise QloraError(
                f"mesh {named}: axes are {', '.join(AXES)}, each a number of devices or -1"
            )
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise QloraError(f"mesh {named}: only one axis can be what is left of the devices")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed:
        raise QloraError(
            f"mesh {named}: {fixed} does not divide {devices}, the number of devices there are"
        )
    rest = devices // fixed
    free = open_axes or [name for name in (FSDP, DATA) if name not in sizes]
    if rest > 1 and not free:
        raise QloraError(
            f"mesh {named}: that makes {fixed} devices, but there are {devices}; give one axis -1"
        )
    return {name: 1 for name in AXES} | dict(sizes) | ({free[0]: rest} if free else {})


def make_mesh(
    sizes: str | Mapping[str, int] | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes data, fsdp and tensor, over all devices of all processes by default.

    sizes: as of `parse_mesh` and `complete`; None: all of them along fsdp. The compiler places what
    no sharding is given for (axes are Auto). Raises QloraError for sizes that do not fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(sizes) if isinstance(sizes, str) else sizes or {}
    shape = complete(sizes, len(devices))
    return jax.make_mesh(
        tuple(shape[name] for name in AXES),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices,
    )
