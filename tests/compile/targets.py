"""Devices that we compile for without having them."""

import dataclasses

from qlora_jax.plan.devices import Device, find

# For its kernels only: `plan` does not know it, since a step is compiled with those of v5.
_V4 = dataclasses.replace(
    find("v5p:2x2x1"), topology={"platform": "tpu", "topology_name": "v4:2x2x1"}
)

TARGETS: dict[str, Device] = {
    "TPU v4": _V4,
    "TPU v5e": find("v5e:2x2"),
    "TPU v5p": find("v5p:2x2x1"),
    "TPU v6e": find("v6e:2x2"),
    "TPU v7x": find("v7x:2x2x1"),
    "RTX A6000": find("a6000"),
    "H200": find("h200"),
}
