"""Making a plan: measure, search for what is largest, and look for what helps."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, SingleDeviceSharding

from qlora_jax.lora import count
from qlora_jax.parallel import Layout
from qlora_jax.plan import abstract
from qlora_jax.plan.compiling import Compiled, Compiler
from qlora_jax.plan.devices import GPUS, Device
from qlora_jax.plan.search import Largest, largest
from qlora_jax.plan.workload import Workload, context
from qlora_jax.training import auto
from qlora_jax.training.estimate import DECODED
from qlora_jax.training.footprint import Footprint

MOST_BATCH = 4096
MOST_TOKENS = 2**20
"""Where a search ends if the model has no limit of its own."""

SEQUENCE_STEP = 128
"""Sequences are searched in steps of a block of attention."""


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A change that was seen to fit. what: in words; options: as one would give it to `train`;
    total: bytes of each device, room: of what there is."""

    what: str
    options: str
    total: int
    room: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes, and what else would fit.

    footprint    of the step; where the compiler refused it, by formula
    compiled     the compiler's answer; None: all is by formula
    batch        the largest batch at this sequence length, None if it was not searched for
    sequence     the largest sequence at this batch
    suggestions  if the step does not fit
    compiles     how many there were, seconds that they took together
    """

    workload: Workload
    device: Device
    footprint: Footprint
    compiled: Compiled | None
    batch: Largest | None
    sequence: Largest | None
    suggestions: tuple[Suggestion, ...]
    trained: int
    compiles: int
    seconds: float

    @property
    def fits(self) -> bool:
        refused = self.compiled is not None and self.compiled.refusal is not None
        return not refused and self.footprint.total <= self.device.room


def by_formula(workload: Workload, device: Device, implementation: str | None = None) -> Footprint:
    """The footprint by formula; nothing is compiled. implementation: of 4-bit products, by default
    the device's own."""
    where: Any = _layout(workload, device)
    return abstract.of_workload(workload).estimate(
        where or SingleDeviceSharding(jax.local_devices(backend="cpu")[0]),
        decoded=DECODED[implementation or _usual(device)],
        kernels=device.attention,
    )


def with_memory_chosen(workload: Workload, device: Device) -> Workload:
    """The workload with what `memory="auto"` sets on a device that JAX may use the whole of."""
    step = abstract.of_workload(workload)
    training, _ = auto.choose(
        step.model, workload.training, step.state, step.batch, int(auto.SHARE * device.room),
        _layout(workload, device), decoded=DECODED[_usual(device)], kernels=device.attention,
    )  # fmt: skip
    return dataclasses.replace(workload, training=training)


def _usual(device: Device) -> str:
    """The code of 4-bit products to count with before a compiler has said."""
    return "pallas_tpu" if device.compiler == "tpu" else "xla"


def _layout(workload: Workload, device: Device) -> Layout | None:
    """Over the mesh of several devices, none of which needs to be there: it is of shapes alone."""
    if device.count == 1:
        return None
    axes = workload.axes(device.count)
    mesh: Any = AbstractMesh(tuple(axes.values()), tuple(axes))
    return Layout.of(mesh, workload.config())


class Planner:
    """Answers about one workload on one device. compiler: None: by formula only. shorter: what one
    would give to `train` for sequences of so many tokens."""

    def __init__(
        self,
        workload: Workload,
        device: Device,
        compiler: Compiler | None,
        shorter: Callable[[int], str] = "--max-length {}".format,
    ) -> None:
        self._workload, self._device, self._compiler = workload, device, compiler
        self._shorter = shorter
        self._implementation: str | None = None
        self._estimates: dict[str, Footprint] = {}
        self._offset = 0
        self._compiled: list[Compiled] = []

    def plan(self, *, trials: int = 2) -> Plan:
        """The whole plan. trials: compiles for each of the largest batch and sequence; 0: none is
        searched for. Raises QloraError for what cannot be a step of that model."""
        workload, device = self._workload, self._device
        estimated = self._estimate(workload)
        compiled = None
        footprint = estimated
        if self._compiler is not None:
            compiled = self._compile(workload)
            self._implementation = compiled.implementation
            self._estimates.clear()
            estimated = self._estimate(workload)
            footprint = compiled.footprint or estimated
            self._offset = footprint.total - estimated.total
        fits = (compiled is None or compiled.refusal is None) and footprint.total <= device.room
        total = None if compiled is not None and compiled.footprint is None else footprint.total
        batch = sequence = None
        if trials:
            batch = self._largest(
                lambda n: workload.with_training(batch_size=n),
                workload.batch,
                total,
                MOST_BATCH,
                workload.rows(device.count),
                trials,
            )
            most = context(workload.config()) or MOST_TOKENS
            sequence = self._largest(
                workload.with_time, workload.time, total, most, SEQUENCE_STEP, trials
            )
        suggestions = () if fits else tuple(self._suggest(batch, sequence))
        state = abstract.of_workload(workload).state
        return Plan(
            workload=workload,
            device=device,
            footprint=footprint,
            compiled=compiled,
            batch=batch,
            sequence=sequence,
            suggestions=suggestions,
            trained=count(state.adapters),
            compiles=len(self._compiled),
            seconds=sum(c.seconds for c in self._compiled),
        )

    def _estimate(self, workload: Workload) -> Footprint:
        key = workload.to_json()
        if key not in self._estimates:
            self._estimates[key] = by_formula(workload, self._device, self._implementation)
        return self._estimates[key]

    def _compile(self, workload: Workload, device: Device | None = None) -> Compiled:
        assert self._compiler is not None
        compiled = self._compiler(workload, device)
        self._compiled.append(compiled)
        return compiled

    def _corrected(self, workload: Workload) -> int:
        """Bytes by formula, off by what it was off where the compiler was asked."""
        return self._estimate(workload).total + self._offset

    def _measured(self, workload: Workload, device: Device | None = None) -> int | None:
        """Bytes by the compiler, None where it refuses; by formula if there is none."""
        if self._compiler is None:
            return self._estimate(workload).total
        compiled = self._compile(workload, device)
        return compiled.footprint and compiled.footprint.total

    def _largest(
        self,
        changed: Callable[[int], Workload],
        now: int,
        total: int | None,
        most: int,
        step: int,
        trials: int,
    ) -> Largest:
        room = self._device.room
        at_now = self._corrected(changed(now))
        found = largest(
            lambda n: self._corrected(changed(n)), room, {now: at_now}, most, step=step, trials=5,
            guess=2 * now if at_now <= room else now // 2,
        )  # fmt: skip
        if self._compiler is None:
            return found
        return largest(
            lambda n: self._measured(changed(n)), room, {now: total}, most, step=step,
            trials=trials, guess=found.fits,
        )  # fmt: skip

    def _suggest(self, batch: Largest | None, sequence: Largest | None) -> list[Suggestion]:
        """What fits: first what leaves the step as it is, then smaller steps, then a larger device.
        Each was compiled, where there is a compiler."""
        workload, room = self._workload, self._device.room
        found = []
        for what, options, changes in _cheaper(workload):
            changed = workload.with_training(**changes)
            if self._corrected(changed) > room:
                continue
            total = self._measured(changed)
            if total is not None and total <= room:
                found.append(Suggestion(what, options, total, room))
                break
        if batch is not None and 0 < batch.fits < workload.batch:
            # The same rows a step, and of each part the same for every device.
            rows = workload.rows(self._device.count)
            least = math.ceil(workload.batch / batch.fits)
            most = workload.batch // rows
            parts = next(n for n in range(least, most + 1) if workload.batch % (n * rows) == 0)
            size, accumulate = workload.batch // parts, parts * workload.training.accumulate
            changed = workload.with_training(batch_size=size, accumulate=accumulate)
            total = self._measured(changed)
            if total is not None and total <= room:
                options = f"--training.batch-size {size} --training.accumulate {accumulate}"
                found.append(Suggestion("smaller micro-batches, accumulated", options, total, room))
        if sequence is not None and 0 < sequence.fits < workload.time:
            total = self._corrected(workload.with_time(sequence.fits))
            options = self._shorter(sequence.fits)
            found.append(Suggestion("shorter sequences", options, total, room))
        return found + self._larger_device()

    def _larger_device(self) -> list[Suggestion]:
        if self._device.compiler != "gpu":
            return []
        needed = max(self._corrected(self._workload), self._device.room + 1)
        device = next((gpu for gpu in GPUS.values() if gpu.room >= needed), None)
        if device is None:
            return []
        total = self._measured(self._workload, device)
        if total is None or total > device.room:
            return []
        return [Suggestion("a larger device", device.title, total, device.room)]


def _cheaper(workload: Workload) -> list[tuple[str, str, dict[str, Any]]]:
    """Changes of the settings that take less memory for more time: (words, options, fields), least
    time first."""
    training = workload.training
    policies = list(_REMAT)
    later = policies[policies.index(training.remat) + 1 :]
    own = " --training.memory manual" if training.memory == "auto" else ""  # else it chooses again
    page = ("optimizer state paged to the host", f"--training.paged{own}", {"paged": True})
    alone = [
        (_REMAT[policy], f"--training.remat {policy}{own}", {"remat": policy}) for policy in later
    ]
    if training.paged:
        return alone
    both = [
        (f"{words}, and {page[0]}", f"{options} {page[1]}", fields | page[2])
        for words, options, fields in alone
    ]
    return [page, *alone, *both]


_REMAT = {
    "none": "activations as they are",
    "dots": "compute norms, gates and attention again in the backward pass",
    "names": "compute the MLP's wide arrays again in the backward pass",
    "full": "compute whole layers again in the backward pass",
    "offload": "activations in the host's memory",
}
