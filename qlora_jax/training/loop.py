"""The loop of a run: step after step, with what is due between them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from qlora_jax import lora
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.data import Batch
from qlora_jax.errors import QloraError
from qlora_jax.parallel import whole_here
from qlora_jax.training.checkpoints import RunCheckpoints
from qlora_jax.training.evaluation import HeldOut
from qlora_jax.training.interrupts import Interrupts
from qlora_jax.training.log import StepLog, due
from qlora_jax.training.report import MetricsFile, Progress, Silence
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.step import Metrics, TrainState
from qlora_jax.training.stream import StepBatches


@dataclasses.dataclass
class Loop:
    """A run that stands after `number` steps, in `state`.

    about: what `describe_run` says of it. place: puts a batch where `step` takes it.
    """

    model: AnyModel
    config: lora.LoraConfig | lora.VeraConfig
    settings: TrainSettings
    output: Path
    about: dict[str, Any]
    stream: StepBatches
    place: Callable[[Batch], Any]
    step: Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]
    held_out: HeldOut | None
    checkpoints: RunCheckpoints
    interrupts: Interrupts
    metrics: MetricsFile
    progress: Progress | Silence
    log: StepLog
    state: TrainState
    number: int

    def go_on(self) -> bool:
        """Takes the steps that are left; the last one's state is saved. Whether all was done: not,
        if a signal came. Raises QloraError as `fit`."""
        evaluated = self._evaluate()  # what an interruption had left undone
        if not evaluated:
            return False
        for batch in self.stream.start(self.number):
            placed = self.place(batch)
            self.state, measured = self.step(self.state, self.model.params, placed)
            real_tokens = self.stream.tokens_of(self.number)
            self.number += 1
            self.interrupts.agree(self.number)
            self.log.dispatched(self.number, measured, real_tokens, self.stream.waited)
            self.checkpoints.check()
            stopping = self._last or bool(self.interrupts.caught) or self._stuck
            saving = stopping or due(self.number, self.settings.save_every)
            if not (saving or self._evaluating):
                continue
            self.log.catch_up(write=stopping)
            if self._stuck:
                raise self._given_up()
            try:
                evaluated = self._evaluate()
            except Exception:
                # What was trained is not lost with it: such as where a device has no room for it.
                self._save()
                self.checkpoints.wait()
                raise
            # After the evaluation, so that what goes on from here has its line.
            if saving or self.interrupts.caught:
                self._save()
            if self.interrupts.caught:
                break
            self.log.restart_clock()
        self.checkpoints.wait()
        return evaluated and self._last

    @property
    def _last(self) -> bool:
        return self.number == self.stream.steps

    @property
    def _stuck(self) -> bool:
        return self.log.in_a_row >= self.settings.max_skipped

    @property
    def _evaluating(self) -> bool:
        wanted = self.number > 0 and (self._last or due(self.number, self.settings.eval_every))
        return self.held_out is not None and wanted

    def _evaluate(self) -> bool:
        """Evaluates if that is due and was not done before. Whether it is done: not, if a signal
        came."""
        lines = (entry for entry in reversed(self.metrics.history) if "eval_tokens" in entry)
        newest = next(lines, {"step": 0})
        if not self._evaluating or self.held_out is None or newest["step"] == self.number:
            return True
        result = self.held_out.evaluate(self.state.adapters, self.interrupts)
        if result is None:
            return False
        loss = {"eval_loss": result[0]} if math.isfinite(result[0]) else {}
        self.metrics.add(step=self.number, **loss, eval_tokens=result[1])
        self.progress.say(f"step {self.number}: held-out loss {result[0]:.4f}")
        return True

    def _save(self) -> None:
        adapters = jax.device_get(whole_here(self.state.adapters))
        write = functools.partial(
            peft.save, adapters=adapters, model=self.model, config=self.config
        )
        self.checkpoints.save(self.number, self.state, self.about, self.log.counts, write)

    def _given_up(self) -> QloraError:
        """The error of a run whose last steps were all skipped; its state is saved."""
        try:
            self._save()
            self.checkpoints.wait()
            kept = f"the state before them is saved in {self.output / f'step-{self.number}'}"
        except QloraError as error:
            kept = str(error)
        skipped = range(self.number - self.log.in_a_row, self.number)
        rows = [f"step {n + 1}: {'; '.join(self.stream.examples_of(n))}" for n in skipped]
        return QloraError(
            f"step {self.number}: the loss or the gradient was not finite in {len(skipped)} steps "
            f"in a row, which were skipped; {kept}. Try a lower learning rate or more warm-up, or "
            "look at what these steps trained on:\n  " + "\n  ".join(rows)
        )
