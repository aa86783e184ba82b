"""Devices that one may rent, and what their compilers are told about them.

Memory of a GPU is what CUDA reports as its total (PyTorch prints the same number in its messages
about running out), which is less than what is printed on the box. Memory of a TPU is what its
compiler says is there for programs: its runtime's own share is off already.
"""

import dataclasses
import math
import re
from typing import Any, Literal

from qlora_jax.errors import QloraError
from qlora_jax.models.attention import AttentionImplementation

GIB = 2**30

CUDA_KEEPS = GIB // 2
"""What a CUDA context, loaded kernels and the libraries' workspaces take of a GPU."""

CUDNN = (9, 10)
"""The version of cuDNN that is compiled for; none needs to be installed."""

_GPU_TEXT = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: {threads} core_count: {cores}
  fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}000000 l2_cache_size: {l2}
  clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ {capability} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA" dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} }}
device_description_str: "{title}"
"""


@dataclasses.dataclass(frozen=True)
class Device:
    """One GPU, or the chips of a TPU slice.

    name      as a person types it
    title     as its maker calls it
    compiler  which one it needs: see `compilers`
    topology  what `jax.experimental.topologies.get_topology_desc` is called with
    memory    bytes of each device
    keeps     bytes of them that the runtime takes for itself
    attention the kernels of attention that run on it
    count     how many devices, as JAX counts them
    """

    name: str
    title: str
    compiler: Literal["gpu", "tpu"]
    topology: dict[str, Any]
    memory: int
    keeps: int
    attention: tuple[AttentionImplementation, ...] = ()
    count: int = 1

    @property
    def room(self) -> int:
        """Bytes of each device that a program may take."""
        return self.memory - self.keeps

    def devices(self) -> list[Any]:
        """Devices to put into shardings: they can be compiled for, nothing more."""
        from jax.experimental import topologies

        return list(topologies.get_topology_desc(**self.topology).devices)

    def device(self) -> Any:
        """The first of them."""
        return self.devices()[0]


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """NVIDIA's numbers for a compute capability (CUDA C++ Programming Guide, the table of technical
    specifications): bytes of shared memory in a multiprocessor and for a block, threads, FP32
    units."""

    capability: str
    shared: int
    optin: int
    threads: int
    fpus: int


_TURING = _Architecture("major: 7 minor: 5", 65536, 65536, 1024, 64)
_A100 = _Architecture("major: 8", 167936, 166912, 2048, 64)
_AMPERE = _Architecture("major: 8 minor: 6", 102400, 101376, 1536, 128)
_ADA = dataclasses.replace(_AMPERE, capability="major: 8 minor: 9")
_HOPPER = _Architecture(
    "major: 9 feature_extension: ACCELERATED_FEATURES", 233472, 232448, 2048, 128
)
_BLACKWELL = dataclasses.replace(
    _HOPPER, capability="major: 10 feature_extension: ACCELERATED_FEATURES"
)


def _gpu(
    name: str,
    title: str,
    architecture: _Architecture,
    *,
    gib: float,
    cores: int,
    bandwidth: int,
    l2: int,
    clock: float,
) -> Device:
    """gib: CUDA's total; bandwidth in MB/s and l2 in MiB, of the data sheets."""
    memory = round(gib * GIB)
    text = _GPU_TEXT.format(
        title=title,
        memory=memory,
        cores=cores,
        bandwidth=bandwidth,
        l2=l2 * 2**20,
        clock=clock,
        cudnn=CUDNN,
        **dataclasses.asdict(architecture),
    )
    topology = {"platform": "cuda", "topology_name": "1x1x1", "topology": "1x1x1"}
    attention = () if architecture is _TURING else ("cudnn",)  # from compute capability 8.0 on
    topology |= {"target_config": text}
    return Device(name, title, "gpu", topology, memory, CUDA_KEEPS, attention)


_GPUS = (
    _gpu("t4", "NVIDIA T4", _TURING, gib=14.75, cores=40, bandwidth=320000, l2=4, clock=1.59),
    _gpu("l4", "NVIDIA L4", _ADA, gib=22.17, cores=58, bandwidth=300000, l2=48, clock=2.04),
    _gpu("a10g", "NVIDIA A10G", _AMPERE, gib=22.06, cores=80, bandwidth=600000, l2=6, clock=1.71),
    _gpu(
        "4090", "NVIDIA GeForce RTX 4090", _ADA,
        gib=23.64, cores=128, bandwidth=1008096, l2=72, clock=2.52,
    ),
    _gpu(
        "3090", "NVIDIA GeForce RTX 3090", _AMPERE,
        gib=23.69, cores=82, bandwidth=936096, l2=6, clock=1.695,
    ),
    _gpu(
        "a100-40", "NVIDIA A100 40 GB", _A100,
        gib=39.39, cores=108, bandwidth=1555200, l2=40, clock=1.41,
    ),
    _gpu("l40s", "NVIDIA L40S", _ADA, gib=44.40, cores=142, bandwidth=864096, l2=96, clock=2.52),
    _gpu(
        "a6000", "NVIDIA RTX A6000", _AMPERE,
        gib=51041271808 / GIB, cores=84, bandwidth=768096, l2=6, clock=1.8,
    ),
    _gpu(
        "a100-80", "NVIDIA A100 80 GB", _A100,
        gib=79.15, cores=108, bandwidth=2039040, l2=40, clock=1.41,
    ),
    _gpu(
        "h100", "NVIDIA H100 80 GB", _HOPPER,
        gib=79.11, cores=132, bandwidth=3352320, l2=50, clock=1.98,
    ),
    _gpu(
        "h200", "NVIDIA H200", _HOPPER,
        gib=139.72, cores=132, bandwidth=4800000, l2=50, clock=1.98,
    ),
    _gpu(
        "b200", "NVIDIA B200", _BLACKWELL,
        gib=178.35, cores=148, bandwidth=7700000, l2=126, clock=1.965,
    ),
)  # fmt: skip

GPUS = {device.name: device for device in sorted(_GPUS, key=lambda device: device.memory)}
"""By name, least memory first."""


@dataclasses.dataclass(frozen=True)
class _Generation:
    """gib: what libtpu's compiler says of a device that it has; per_chip: devices, as JAX counts;
    axes: of a topology."""

    title: str
    platform: str
    gib: float
    axes: int
    per_chip: int = 1


_TPUS = {
    "v5e": _Generation("Google TPU v5e", "v5e", 15.75, 2),
    "v6e": _Generation("Google TPU v6e", "v6e", 31.24, 2),
    "v5p": _Generation("Google TPU v5p", "v5p", 95.73, 3),
    "v7x": _Generation("Google TPU v7x", "tpu7x", 94.74, 3, per_chip=2),
}

_SLICES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
"""Topology of a v5e or v6e slice by its number of chips, the "v5e-8" of Google's price lists."""


def find(name: str) -> Device:
    """The device of that name: "a6000", "v5e", "v5e-8", "v5p:2x2x1". Raises QloraError for others,
    with a list of all."""
    key = name.lower().removeprefix("rtx").strip(" -_")
    if key in GPUS:
        return GPUS[key]
    generation, _, shape = key.replace("v5litepod", "v5e").partition(":")
    if generation.partition("-")[0] in _TPUS:
        generation, _, chips = generation.partition("-")
        return _slice(name, generation, shape, chips)
    raise QloraError(
        f"no device {name!r} is known. GPUs: {', '.join(GPUS)}. TPUs, with their topology: "
        f"{', '.join(_TPUS)}, such as v5e:2x4 (or v5e-8) and v5p:2x2x1"
    )


def _slice(name: str, generation: str, shape: str, chips: str) -> Device:
    about = _TPUS[generation]
    if chips and shape:
        raise QloraError(f"device {name!r}: give the number of chips or the topology, not both")
    if chips:
        if about.axes != 2 or not chips.isdecimal() or int(chips) not in _SLICES:
            sizes = f", or {generation}-N, N one of {', '.join(map(str, _SLICES))}"
            raise QloraError(
                f"device {name!r}: give the topology, such as {generation}:"
                f"{'x'.join(['2', '2', '1'][: about.axes])}{sizes if about.axes == 2 else ''}"
            )
        shape = _SLICES[int(chips)]
    shape = shape or "x".join("1" * about.axes)
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{about.axes - 1}}}", shape):
        raise QloraError(
            f"device {name!r}: a topology of {generation} has {about.axes} numbers of chips, such "
            f"as {generation}:{'x'.join('2' * about.axes)}"
        )
    if about.axes == 2 and shape not in _SLICES.values():
        raise QloraError(
            f"device {name!r}: slices of {generation} are {', '.join(_SLICES.values())}"
        )
    count = math.prod(map(int, shape.split("x"))) * about.per_chip
    topology = {"platform": "tpu", "topology_name": f"{about.platform}:{shape}"}
    title = f"{about.title}, {shape}" if count > about.per_chip else about.title
    memory = round(about.gib * GIB)
    return Device(f"{generation}:{shape}", title, "tpu", topology, memory, 0, ("splash",), count)
