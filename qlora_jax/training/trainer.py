"""`fit`: a whole training run, from tokenized examples to a saved adapter."""

import dataclasses
import functools
import importlib.util
import math
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax import lora
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.model import Model
from qlora_jax.data import IGNORE, TokenizedDataset, TokenizedExample, evaluation_batches
from qlora_jax.errors import QloraError, missing
from qlora_jax.training.plot import plot_losses
from qlora_jax.training.report import MetricsFile, Progress, Silence, peak_memory
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.step import Metrics, TrainState, make_eval_step, make_train_step
from qlora_jax.training.stream import StepBatches, sequence_length

_NEEDED_AT_THE_END = (
    ("safetensors", "saving an adapter", "hf"),
    ("matplotlib", "drawing the loss", "cli"),
)


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What `fit` leaves.

    adapters     trained
    history      the lines of metrics.jsonl
    steps        how many were taken
    seconds      of wall time, compiling and evaluating included
    interrupted  whether Ctrl-C cut the run short
    """

    adapters: lora.Adapters
    history: list[dict[str, float]]
    steps: int
    seconds: float
    interrupted: bool


def fit(
    model: Model,
    config: lora.LoraConfig | lora.VeraConfig,
    train: TokenizedDataset,
    settings: TrainSettings,
    output: str | Path,
    *,
    evaluation: TokenizedDataset | None = None,
    adapters: lora.Adapters | None = None,
    optimizer: optax.GradientTransformation | None = None,
    display: bool = True,
) -> FitResult:
    """Trains adapters of `model` on `train` and saves them in `output`, in PEFT's format.

    adapters: to go on from, by default new ones by `config`. optimizer: instead of AdamW on the
    settings' schedule. display: progress on the terminal.

    Beside the adapter, `output` gets loss.png and metrics.jsonl, with two kinds of lines. Of a
    step: step (from 1), loss (nats per labelled token, before the update), grad_norm (before
    clipping), learning_rate (not with an optimizer of one's own), tokens (labelled),
    tokens_per_second (all but padding), memory_bytes (peak), seconds (of this step). Of an
    evaluation: step, eval_loss, eval_tokens.

    The first Ctrl-C ends the run after the step that is under way, and what was trained is saved; a
    second one raises KeyboardInterrupt. Raises QloraError if `output` has an adapter already, for
    examples longer than the settings' sequence length or the model's context, for ids outside its
    vocabulary, and if the loss or the gradient is not finite; then no adapter is saved.
    """
    if not isinstance(model, Model):
        raise QloraError(
            f"{model!r}: fit trains decoders, on examples that a prompt and its answer make up "
            "together; for this one write the loop with make_train_step(model.loss, ...)"
        )
    output = Path(output)
    if (output / peft.WEIGHTS).exists():
        raise QloraError(f"{output}: has an adapter already; choose another folder, or delete it")
    # Said now, not when the run is over and its result would be lost.
    for package, purpose, extra in _NEEDED_AT_THE_END:
        if importlib.util.find_spec(package) is None:
            raise missing(package, purpose, extra)
    for examples in (train, evaluation or ()):
        _check(model, examples)
    stream = StepBatches(train, settings)
    steps = stream.steps
    rates = None if optimizer else _table(settings.learning_rates(steps), steps)
    optimizer = optimizer or settings.optimizer(steps)
    init_key, run_key = jax.random.split(jax.random.key(settings.seed))
    if adapters is None:
        adapters = lora.init(init_key, model.params, config)
    state = TrainState.create(adapters, optimizer, run_key)
    step = make_train_step(
        functools.partial(model.loss, remat=settings.remat),
        optimizer,
        max_grad_norm=settings.max_grad_norm,
        accumulate=settings.accumulate,
        dropout=config.dropout,
    )
    held_out = None
    if evaluation is not None:
        held_out = _HeldOut(model, evaluation, settings)
    output.mkdir(parents=True, exist_ok=True)

    began, number, interrupted = time.perf_counter(), 0, False
    with (
        _Interrupts() as interrupts,
        MetricsFile(output / "metrics.jsonl") as metrics,
        Progress(steps) if display else Silence() as progress,
    ):
        log = _Log(metrics, progress, settings.log_every, steps, rates)
        for number, batch in enumerate(stream.start(), start=1):
            state, measured = step(state, model.params, batch)
            log.dispatched(number, measured, int(batch["attention_mask"].sum()))
            last = number == steps
            evaluating = held_out is not None and (last or _due(number, settings.eval_every))
            saving = not last and _due(number, settings.save_every)
            if not (evaluating or saving or last or interrupts.caught):
                continue
            log.catch_up(write=last or interrupts.caught)
            if saving:
                peft.save(output / f"step-{number}", state.adapters, model, config)
            if held_out is not None and evaluating and not interrupts.caught:
                result = held_out.evaluate(state.adapters, interrupts)
                if result is not None:
                    metrics.add(step=number, eval_loss=result[0], eval_tokens=result[1])
                    progress.say(f"step {number}: held-out loss {result[0]:.4f}")
            if interrupts.caught:
                interrupted = True
                progress.say(f"interrupted after step {number}: saving what was trained")
                break
            log.restart_clock()
        peft.save(output, state.adapters, model, config)
        plot_losses(output / "loss.png", metrics.history)
    seconds = time.perf_counter() - began
    return FitResult(state.adapters, metrics.history, number, seconds, interrupted)


def _check(model: Model, examples: Sequence[TokenizedExample]) -> None:
    """Refuses what the model would take and train on wrongly: on the device nothing is checked."""
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for number, example in enumerate(examples):
        ids, labels = example.input_ids, example.labels
        if len(ids) > context:
            raise QloraError(
                f"example {number} has {len(ids)} tokens, more than the model's context of "
                f"{context}; cut examples to it: --max-length {context}, or max_length={context} "
                "in tokenize"
            )
        outside = (ids < 0) | (ids >= vocabulary)
        if np.any(outside):
            raise QloraError(
                f"example {number} has the token id {ids[outside][0]}, the model's vocabulary is "
                f"0 to {vocabulary - 1}; tokenize with the model's own tokenizer"
            )
        outside = (labels != IGNORE) & ((labels < 0) | (labels >= vocabulary))
        if np.any(outside):
            raise QloraError(
                f"example {number} has the label {labels[outside][0]}, which is neither a token "
                f"(0 to {vocabulary - 1}) nor {IGNORE} for none"
            )


class _Log:
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
        self._pending: tuple[int, Metrics, int] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """What passed until now was no step."""
        self._clock = time.perf_counter()

    def dispatched(self, number: int, measured: Metrics, real_tokens: int) -> None:
        """Step `number` is on its way: waits for the one before it."""
        self.catch_up()
        self._pending = number, measured, real_tokens

    def catch_up(self, write: bool = False) -> None:
        """Waits for the step that is on its way. write: log it even if it is not its turn."""
        if self._pending is None:
            return
        (number, measured, real_tokens), self._pending = self._pending, None
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
        }
        if write or _due(number, self._every):
            self._metrics.add(**entry)
        self._progress.step(number, entry)


class _HeldOut:
    """The evaluation set, and the compiled function that is run on it."""

    def __init__(self, model: Model, dataset: TokenizedDataset, settings: TrainSettings) -> None:
        self._params, self._dataset = model.params, dataset
        self._batch_size = settings.batch_size
        self._length = sequence_length(dataset, settings.sequence_length)
        self._step = make_eval_step(model.loss)

    def evaluate(
        self, adapters: lora.Adapters, interrupts: "_Interrupts"
    ) -> tuple[float, int] | None:
        """(mean loss over all labelled tokens, their number); None if interrupted."""
        total, tokens = 0.0, 0.0
        for batch in evaluation_batches(
            self._dataset, self._batch_size, sequence_length=self._length
        ):
            loss, count = self._step(adapters, self._params, batch)
            total, tokens = total + float(loss), tokens + float(count)
            if interrupts.caught:
                return None
        return total / max(tokens, 1.0), int(tokens)


class _Interrupts:
    """Within the block a first Ctrl-C is only noted; a second one raises KeyboardInterrupt.

    An exception in the middle of a step would lose the run: the old state is donated, and the new
    one not yet ours. Python takes signals in its main thread, so elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.caught = False
        self._ours = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "_Interrupts":
        if self._ours:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._ours:
            # None: a handler that was not installed from Python, and cannot be from here.
            signal.signal(signal.SIGINT, self._before or signal.SIG_DFL)

    def _note(self, *_: Any) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = True


def _table(rates: optax.Schedule, steps: int) -> np.ndarray:
    """All rates [steps] at once: asked one by one they would queue behind the steps."""
    return np.asarray(jax.vmap(lambda step: jnp.asarray(rates(step)))(jnp.arange(steps)))


def _due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0
