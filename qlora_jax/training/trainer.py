"""`fit`: a whole training run, from tokenized examples to a saved adapter."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlora_jax import lora
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.model import Model
from qlora_jax.data import Batch, TokenizedDataset, batches, evaluation_batches
from qlora_jax.errors import QloraError
from qlora_jax.training.plot import plot_losses
from qlora_jax.training.report import MetricsFile, Progress, Silence, peak_memory
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.step import TrainState, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What `fit` leaves: adapters, the lines of metrics.jsonl, and whether it was cut short."""

    adapters: lora.Adapters
    history: list[dict[str, float]]
    interrupted: bool


def fit(
    model: Model,
    config: lora.LoraConfig,
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
    settings' schedule. Beside the adapter, `output` gets metrics.jsonl (a line for every step and
    every evaluation) and loss.png. Ctrl-C ends the run early, and what was trained is saved.

    Raises QloraError if `output` has an adapter already, and if the loss is not finite; then
    nothing is saved.
    """
    output = Path(output)
    if (output / peft.WEIGHTS).exists():
        raise QloraError(f"{output}: has an adapter already; choose another folder, or delete it")
    output.mkdir(parents=True, exist_ok=True)
    steps = settings.steps_for(len(train))
    optimizer = optimizer or settings.optimizer(steps)
    rates = settings.learning_rates(steps)
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
    evaluate = make_eval_step(model.loss)
    metrics, interrupted, number = MetricsFile(output / "metrics.jsonl"), False, 0

    def held_out(progress: Progress | Silence) -> None:
        if evaluation is not None:
            loss = _evaluate(evaluate, state.adapters, model, evaluation, settings.batch_size)
            metrics.add(step=number, eval_loss=loss)
            progress.say(f"step {number}: held-out loss {loss:.4f}")

    try:
        with Progress(steps) if display else Silence() as progress:
            try:
                clock = time.perf_counter()
                for batch in _step_batches(train, settings, steps):
                    state, measured = step(state, model.params, batch)
                    values = {key: float(value) for key, value in measured.items()}
                    number += 1
                    now = time.perf_counter()
                    entry = {
                        "step": number,
                        **values,
                        "learning_rate": float(jnp.asarray(rates(number - 1))),
                        "tokens_per_second": float(batch["attention_mask"].sum() / (now - clock)),
                        "memory_bytes": peak_memory(),
                        "seconds": now - clock,
                    }
                    clock = now
                    if not math.isfinite(values["loss"] + values["grad_norm"]):
                        raise QloraError(
                            f"step {number}: the loss is {values['loss']}, the gradient norm "
                            f"{values['grad_norm']}; try a lower learning rate or more warm-up"
                        )
                    metrics.add(**entry)
                    progress.step(number, entry)
                    last = number == steps
                    if settings.eval_every and number % settings.eval_every == 0 and not last:
                        held_out(progress)
                    if settings.save_every and number % settings.save_every == 0 and not last:
                        peft.save(output / f"step-{number}", state.adapters, model, config)
            except KeyboardInterrupt:
                interrupted = True
                progress.say(f"interrupted after step {number}: saving what was trained")
            if not interrupted:
                held_out(progress)
    finally:
        metrics.close()
    peft.save(output, state.adapters, model, config)
    plot_losses(output / "loss.png", metrics.history)
    return FitResult(state.adapters, metrics.history, interrupted)


def _step_batches(train: TokenizedDataset, settings: TrainSettings, steps: int) -> Iterator[Batch]:
    """The run's batches, leaves [B, T] or, accumulating, [accumulate, B, T]."""
    size = settings.batch_size * settings.accumulate
    stream = batches(train, size, seed=settings.seed, sequence_length=sequence_length(train))
    for _, batch in zip(range(steps), stream, strict=False):
        if settings.accumulate == 1:
            yield batch
        else:
            shape = (settings.accumulate, settings.batch_size, -1)
            yield jax.tree.map(lambda x, shape=shape: x.reshape(shape), batch)


def sequence_length(dataset: TokenizedDataset) -> int:
    """T of every batch: the longest example's, rounded up to whole lanes."""
    return -(-max(map(len, dataset)) // 32) * 32


def _evaluate(
    evaluate: Any, adapters: lora.Adapters, model: Model, dataset: TokenizedDataset, size: int
) -> float:
    """The mean loss over all labelled tokens of `dataset`."""
    total = tokens = 0.0
    for batch in evaluation_batches(dataset, size, sequence_length=sequence_length(dataset)):
        loss, count = evaluate(adapters, model.params, batch)
        total, tokens = total + float(loss), tokens + float(count)
    return total / max(tokens, 1.0)
