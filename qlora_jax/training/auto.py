"""`memory="auto"`: the settings that take least time among those that fit the device at hand."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax

from qlora_jax.models.attention import AttentionImplementation, kernels_here
from qlora_jax.models.remat import RematPolicy
from qlora_jax.parallel import Layout
from qlora_jax.quant import backends
from qlora_jax.training.estimate import DECODED, attention_of, estimate
from qlora_jax.training.footprint import count
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.step import TrainState

FASTEST_FIRST: tuple[tuple[RematPolicy, bool], ...] = (
    ("none", False),
    ("dots", False),
    ("names", False),
    ("full", False),
    ("full", True),
    ("offload", True),
)
"""Remat policies, and whether the optimizer is paged. Each policy computes more again than the one
before; paging and `offload` wait for copies too."""

SHARE = 0.95
"""Of the room that may be planned with: the formula is good to some percent."""


def fitting(
    model: Any,
    settings: TrainSettings,
    state: TrainState,
    batch: Any,
    layout: Layout | None = None,
    *,
    may_page: bool = True,
) -> tuple[TrainSettings, str]:
    """The settings with the first of `FASTEST_FIRST` that fits by `estimate`, the last if none
    does, and what was chosen, in words.

    state: shapes; layout: where it will lie, with several devices. may_page: whether the optimizer
    is the settings'. Where a device does not say how much memory it has, as CPUs do not, the
    settings stay as they are.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    room = stats.get("bytes_limit")
    if room is None:
        return settings, f"memory auto: no limit is known here, remat {settings.remat} stays"
    return choose(
        model, settings, state, batch, int(SHARE * room), layout,
        decoded=decoded_here(), kernels=kernels_here(), may_page=may_page,
    )  # fmt: skip


def choose(
    model: Any,
    settings: TrainSettings,
    state: TrainState,
    batch: Any,
    room: int,
    layout: Layout | None = None,
    *,
    decoded: int,
    kernels: Collection[AttentionImplementation] = (),
    may_page: bool = True,
) -> tuple[TrainSettings, str]:
    """As `fitting`, for so many bytes; decoded: as of `estimate`; kernels: of attention."""
    attention = settings.attention or attention_of(model, batch, kernels)
    params = jax.eval_shape(lambda params: params, model.params)
    if layout is None:
        plain = count(state, params)
    else:
        plain = count(layout.state(state), layout.params(params))
    moments, total = plain.optimizer + plain.optimizer_host, 0
    for remat, paged in FASTEST_FIRST:
        if may_page:
            settings = dataclasses.replace(settings, paged=paged)
        settings = dataclasses.replace(settings, remat=remat)
        counted = dataclasses.replace(
            plain,
            optimizer=0 if settings.paged else moments,
            optimizer_host=moments if settings.paged else 0,
        )
        total = estimate(
            model, state, batch, counted, remat=remat, accumulate=settings.accumulate,
            decoded=decoded, attention=attention, rows=1 if layout is None else layout.row_parts,
        ).total  # fmt: skip
        if total <= room:
            break
    text = f"remat {settings.remat}{', paged optimizer' if settings.paged else ''}, about "
    text += f"{total / 2**30:.1f} GiB of {room / 2**30:.1f}"
    return settings, f"memory auto: {text}" + (", which is too much" if total > room else "")


def decoded_here() -> int:
    """How many weights are dense at a time on this machine's devices."""
    kernels = {"tpu": "pallas_tpu", "gpu": "cuda"}.get(jax.default_backend())
    if kernels is None or backends()[kernels] != "available":
        kernels = "xla"
    return DECODED[kernels]
