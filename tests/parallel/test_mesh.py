"""Sizes of the mesh as a person writes them."""

import jax
import pytest

import qlora_jax as qj
from qlora_jax.parallel.mesh import complete, make_mesh, parse_mesh


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("fsdp=8", (1, 8, 1)),
        ("data=2,fsdp=2,tensor=2", (2, 2, 2)),
        ("tensor=2", (1, 4, 2)),
        ("fsdp=4", (2, 4, 1)),
        ("data=-1", (8, 1, 1)),
        (" fsdp = -1 , tensor = 4 ", (1, 2, 4)),
        ("data=8,fsdp=1,tensor=1", (8, 1, 1)),
    ],
)
def test_sizes(text: str, sizes: tuple[int, ...]) -> None:
    assert tuple(complete(parse_mesh(text), 8).values()) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipeline=2", "the axes are data, fsdp, tensor, not 'pipeline'"),
        ("fsdp", "fsdp must be a number of devices.*not ''"),
        ("fsdp=0", "fsdp must be a number of devices"),
        ("fsdp=two", "not 'two'"),
        ("fsdp=2,fsdp=4", "fsdp is given twice"),
        ("fsdp=-1,data=-1", "only one axis"),
        ("fsdp=3", "3 does not divide 8"),
        ("fsdp=16", "16 does not divide 8"),
        ("data=2,fsdp=2,tensor=1", "that makes 4 devices, but there are 8; give one axis -1"),
    ],
)
def test_sizes_that_do_not_fit(text: str, message: str) -> None:
    with pytest.raises(qj.QloraError, match=message):
        complete(parse_mesh(text), 8)


def test_a_mesh_of_all_devices() -> None:
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": jax.device_count(), "tensor": 1}
    assert dict(make_mesh({"tensor": 2}, jax.devices()[:2]).shape)["tensor"] == 2
    for sizes in ({"data": 0}, {"rows": 1}):
        with pytest.raises(qj.QloraError, match="axes are data, fsdp, tensor, each a number"):
            make_mesh(sizes)
