import pytest

from qlora_jax.errors import QloraError
from qlora_jax.plan.devices import GIB, GPUS, find


@pytest.mark.parametrize(
    ("name", "found", "count"),
    [
        ("a6000", "a6000", 1),
        ("RTX-A6000", "a6000", 1),
        ("H200", "h200", 1),
        ("v5e", "v5e:1x1", 1),
        ("v5e-8", "v5e:2x4", 8),
        ("v5litepod-4", "v5e:2x2", 4),
        ("v6e:4x4", "v6e:4x4", 16),
        ("v5p:2x2x1", "v5p:2x2x1", 4),
        ("v7x:2x2x1", "v7x:2x2x1", 8),  # two devices in a chip
    ],
)
def test_names(name, found, count):
    device = find(name)
    assert (device.name, device.count) == (found, count)


def test_a_unknown_device_gets_the_list():
    with pytest.raises(QloraError, match="a6000.*h200.*v5e.*v5e:2x4"):
        find("gtx-1080")


@pytest.mark.parametrize(
    "name", ["v5e:2x2x2", "v5p:2x2", "v5e:0x4", "v5p-8", "v5e-3", "v5e-x", "v5e-8:4x4", "v6e:3x5"]
)
def test_topologies_that_there_are_not(name):
    with pytest.raises(QloraError, match=name):
        find(name)


def test_gpus_are_in_order_and_keep_less_than_they_have():
    rooms = [gpu.room for gpu in GPUS.values()]
    assert rooms == sorted(rooms)
    a6000 = GPUS["a6000"]
    assert a6000.memory == 51041271808  # what CUDA says of one
    assert a6000.room == a6000.memory - GIB // 2


def test_the_compiler_is_told_the_memory():
    text = GPUS["a6000"].topology["target_config"]
    assert "device_memory_size: 51041271808" in text and "major: 8 minor: 6" in text
    assert "memory_bandwidth: 768096000000 " in text
