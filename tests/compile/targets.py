"""Devices that we compile for without having them; the numbers are the makers'."""

import dataclasses
from typing import Any

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: {threads} core_count: {cores}
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {l2}
  clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ {capability} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A device: which compiler, and what the compiler is told about it."""

    compiler: str
    topology: dict[str, Any]

    def device(self) -> Any:
        """A device to put into shardings; it can be compiled for, nothing more."""
        from jax.experimental import topologies

        return topologies.get_topology_desc(**self.topology).devices[0]


def _gpu(**numbers: Any) -> Target:
    config = {"target_config": _GPU.format(**numbers)}
    name = {"platform": "cuda", "topology_name": "1x1x1", "topology": "1x1x1"}
    return Target("gpu", name | config)


def _tpu(topology: str) -> Target:
    return Target("tpu", {"platform": "tpu", "topology_name": topology})


TARGETS = {
    "TPU v4": _tpu("v4:2x2x1"),
    "TPU v5e": _tpu("v5e:2x2"),
    "TPU v5p": _tpu("v5p:2x2x1"),
    "TPU v6e": _tpu("v6e:2x2"),
    "TPU v7x": _tpu("tpu7x:2x2x1"),
    "RTX A6000": _gpu(
        name="NVIDIA RTX A6000",
        shared=102400,
        threads=1536,
        cores=84,
        bandwidth=768096000000,
        l2=6291456,
        clock=1.8,
        memory=51041271808,
        optin=101376,
        capability="major: 8 minor: 6",
    ),
    "H200": _gpu(
        name="NVIDIA H200",
        shared=233472,
        threads=2048,
        cores=132,
        bandwidth=4800000000000,
        l2=52428800,
        clock=1.98,
        memory=151397597184,
        optin=232448,
        capability="major: 9 feature_extension: ACCELERATED_FEATURES",
    ),
}
