"""A plan, as a person reads it and as a program does."""

import dataclasses
from typing import Any

from qlora_jax.plan.devices import GIB, Device
from qlora_jax.plan.planner import Plan
from qlora_jax.plan.search import Largest
from qlora_jax.training.footprint import Footprint

PARTS = {
    "codes": "base: 4-bit codes",
    "scales": "base: scales",
    "embeddings": "embeddings and head",
    "dense": "norms and other dense",
    "adapters": "adapters",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "activations",
    "working": "working memory",
}
"""Fields of a Footprint that lie on the device -> what a person calls them."""

JAX_TAKES = 0.75
"""Of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


def sizes(footprint: Footprint) -> dict[str, int]:
    """Label -> bytes on each device, of the parts that there are."""
    fields = {label: getattr(footprint, field) for field, label in PARTS.items()}
    return {label: size for label, size in fields.items() if size}


def to_json(plan: Plan) -> dict[str, Any]:
    """All of a plan in numbers, bytes of each device."""
    workload, footprint = plan.workload, plan.footprint
    compiled = plan.compiled
    return {
        "model_type": workload.about.get("model_type"),
        "device": {
            "name": plan.device.name,
            "title": plan.device.title,
            "count": plan.device.count,
            "memory": plan.device.memory,
            "room": plan.device.room,
        },
        "batch": workload.batch,
        "sequence": workload.time,
        "accumulate": workload.training.accumulate,
        "rank": workload.lora.rank,
        "remat": workload.training.remat,
        "optimizer": workload.training.optimizer,
        "paged": workload.training.paged,
        "trained_parameters": plan.trained,
        "method": "formula" if compiled is None else "compiled",
        "implementation": compiled and compiled.implementation,
        "attention": compiled and compiled.attention,
        "refusal": compiled and compiled.refusal,
        "footprint": dataclasses.asdict(footprint),
        "total": footprint.total,
        "host": footprint.host,
        "fits": plan.fits,
        "largest_batch": plan.batch and dataclasses.asdict(plan.batch),
        "largest_sequence": plan.sequence and dataclasses.asdict(plan.sequence),
        "suggestions": [dataclasses.asdict(suggestion) for suggestion in plan.suggestions],
        "compiles": plan.compiles,
        "compile_seconds": plan.seconds,
    }


def headline(plan: Plan) -> list[str]:
    """What is planned, in two lines."""
    workload = plan.workload
    config, lora, training = workload.config(), workload.lora, workload.training
    form = workload.quantization
    base = workload.dtype if form is None else form.codebook.upper()
    base += " with double quantization" if form is not None and form.double_quant else ""
    targets = lora.targets if isinstance(lora.targets, str) else " ".join(lora.targets)
    accumulated = f", {training.accumulate} accumulated" if training.accumulate > 1 else ""
    return [
        f"{config.model_type} of width {width(config)}, {depth(config)} layers, base {base}; "
        f"rank {lora.rank} on {targets}: {plan.trained:,} parameters trained",
        f"batch {workload.batch} x {workload.time} tokens{accumulated}, remat {training.remat}, "
        f"{'paged ' if training.paged else ''}{training.optimizer}, on "
        f"{plan.device.title}",
    ]


def width(config: Any) -> int:
    """D of any family."""
    return getattr(config, "hidden_size", None) or config.d_model


def depth(config: Any) -> int:
    """Layers of any family."""
    layers = getattr(config, "num_hidden_layers", None)
    return layers if layers is not None else config.num_layers + config.num_decoder_layers


def verdict(plan: Plan) -> str:
    """Whether it fits."""
    total, room = plan.footprint.total, plan.device.room
    each = " of each device" if plan.device.count > 1 else ""
    if plan.compiled is not None and plan.compiled.refusal is not None:
        return f"does not fit: {plan.compiled.refusal}"
    if plan.fits:
        return f"fits: {gib(total)} of {gib(room)}{each}, {gib(room - total)} free"
    return f"does not fit: {gib(total)} of {gib(room)}{each}, {gib(total - room)} too much"


def findings(plan: Plan) -> list[str]:
    """The largest batch and sequence, and what to change."""
    lines = []
    workload = plan.workload
    if plan.batch is not None:
        at = f"batch at {workload.time} tokens"
        lines.append(_largest(plan.batch, at, ""))
    if plan.sequence is not None:
        at = f"sequence at batch {workload.batch}"
        lines.append(_largest(plan.sequence, at, " tokens"))
    if plan.suggestions:
        lines += ["", "What fits instead:" if plan.compiled else "What would fit, by formula:"]
        lines += [
            f"  {s.what}: {s.options}  ({gib(s.total)} of {gib(s.room)})" for s in plan.suggestions
        ]
    elif not plan.fits:
        lines += ["", "No change of these settings was found that fits."]
    return lines


def _largest(found: Largest, what: str, unit: str) -> str:
    if found.fits == 0:
        return f"Largest {what}: none was found that fits"
    limit = "more there cannot be" if found.fails is None else f"{found.fails:,} does not fit"
    if not found.exact:
        limit = f"at least; {limit}" if found.fails else "at least"
    return f"Largest {what}: {found.fits:,}{unit} ({limit})"


def footnotes(plan: Plan) -> list[str]:
    """How it was found out, and what to set on the day."""
    notes = []
    host = plan.footprint.host
    if host:
        notes.append(f"In the host's memory, pinned, for each device: {gib(host)}.")
    if plan.compiled is None:
        notes.append("ESTIMATE by formula: nothing was compiled.")
    else:
        times = "once" if plan.compiles == 1 else f"{plan.compiles} times"
        notes.append(
            f"The train step was compiled for it {times}, in {plan.seconds:.0f} s; 4-bit products "
            f"by {plan.compiled.implementation}, attention by {plan.compiled.attention}."
        )
    if plan.device.compiler == "gpu":
        notes.append(_kept_back(plan.device))
    fraction = plan.footprint.total / plan.device.memory
    if plan.device.compiler == "gpu" and plan.fits and fraction > JAX_TAKES:
        share = plan.device.room / plan.device.memory
        notes.append(
            f"JAX takes {JAX_TAKES:.0%} of a GPU by itself: set "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={int(share * 100) / 100:.2f}"
        )
    return notes


def _kept_back(device: Device) -> str:
    return (
        f"CUDA reports {gib(device.memory)} of the device, {gib(device.keeps)} of which is left to "
        "its context and libraries."
    )


def gib(size: int) -> str:
    """ "12.3 GiB", "45 MiB"."""
    if abs(size) < GIB / 10:
        return f"{size / 2**20:.0f} MiB"
    return f"{size / GIB:.1f} GiB"
