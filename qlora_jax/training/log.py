"""The metrics of a run's steps, as they come off the device."""

import math
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.training.report import MetricsFile, Progress, Silence, peak_memory
from qlora_jax.training.step import Metrics


class StepLog:
    """Metrics of the steps, read one step behind, so that the device never waits for us.

    skipped   how many steps of the run were skipped
    in_a_row  how many of them are the last ones
    """

    def __init__(
        self,
        metrics: MetricsFile,
        progress: Progress | Silence,
        every: int,
        rates: np.ndarray | None,
        counts: Mapping[str, int],
    ) -> None:
        self._metrics, self._progress, self._rates = metrics, progress, rates
        self._every = every
        self.skipped, self.in_a_row = counts.get("skipped", 0), counts.get("in_a_row", 0)
        self._pending: tuple[int, Metrics, int, float] | None = None
        self.restart_clock()

    @property
    def counts(self) -> dict[str, int]:
        """What a run that goes on later has to know."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def restart_clock(self) -> None:
        """What passed until now was no step."""
        self._clock = time.perf_counter()

    def dispatched(self, number: int, measured: Metrics, real_tokens: int, waited: float) -> None:
        """Step `number` is on its way: waits for the one before it."""
        self.catch_up()
        self._pending = number, measured, real_tokens, waited

    def catch_up(self, write: bool = False) -> None:
        """Waits for the step that is on its way. write: log it even if it is not its turn."""
        if self._pending is None:
            return
        (number, measured, real_tokens, waited), self._pending = self._pending, None
        values = {key: float(value) for key, value in measured.items()}
        seconds = time.perf_counter() - self._clock
        self.restart_clock()
        if self._rates is not None:
            # The optimizer, and with it the schedule, knows nothing of steps that were skipped.
            values["learning_rate"] = float(self._rates[number - 1 - self.skipped])
        skipped = values["skipped"] > 0
        self.skipped += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        entry = {
            "step": number,
            # JSON has no numbers that are not finite.
            **{key: value for key, value in values.items() if math.isfinite(value)},
            "skipped": self.skipped,
            "tokens_per_second": real_tokens / seconds,
            "memory_bytes": peak_memory(),
            "seconds": seconds,
            "input_seconds": waited,
        }
        if write or skipped or due(number, self._every):
            self._metrics.add(**entry)
        if skipped:
            found = f"the loss is {values['loss']}, the gradient norm {values['grad_norm']}"
            self._progress.say(f"step {number} is skipped: {found}")
        self._progress.step(number, entry)


def rate_table(rates: optax.Schedule, steps: int) -> np.ndarray:
    """All rates [steps] at once: asked one by one they would queue behind the steps."""
    return np.asarray(jax.vmap(lambda step: jnp.asarray(rates(step)))(jnp.arange(steps)))


def due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0
