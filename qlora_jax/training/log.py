"""The metrics of a run's steps, as they come off the device."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.errors import QloraError
from qlora_jax.training.report import MetricsFile, Progress, Silence, peak_memory
from qlora_jax.training.step import Metrics


class StepLog:
    """Metrics of the steps, read one step behind, so that the device never waits for us."""

    def __init__(
        self,
        metrics: MetricsFile,
        progress: Progress | Silence,
        every: int,
        steps: int,
        rates: np.ndarray | None,
    ) -> None:
        self._metrics, self._progress, self._rates = metrics, progress, rates
        self._every, self._steps = every, steps
        self._pending: tuple[int, Metrics, int, float] | None = None
        self.restart_clock()

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
        if not math.isfinite(values["loss"] + values["grad_norm"]):
            raise QloraError(
                f"step {number}: the loss is {values['loss']}, the gradient norm "
                f"{values['grad_norm']}; try a lower learning rate or more warm-up"
            )
        seconds = time.perf_counter() - self._clock
        self.restart_clock()
        if self._rates is not None:
            values["learning_rate"] = float(self._rates[number - 1])
        entry = {
            "step": number,
            **values,
            "tokens_per_second": real_tokens / seconds,
            "memory_bytes": peak_memory(),
            "seconds": seconds,
            "input_seconds": waited,
        }
        if write or due(number, self._every):
            self._metrics.add(**entry)
        self._progress.step(number, entry)


def rate_table(rates: optax.Schedule, steps: int) -> np.ndarray:
    """All rates [steps] at once: asked one by one they would queue behind the steps."""
    return np.asarray(jax.vmap(lambda step: jnp.asarray(rates(step)))(jnp.arange(steps)))


def due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0
