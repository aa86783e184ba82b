"""`fit`: a whole training run, from tokenized examples to a saved adapter."""

import dataclasses
import functools
import importlib.util
import time
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from qlora_jax import lora
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.data import TokenizedDataset
from qlora_jax.errors import QloraError, missing
from qlora_jax.parallel import Layout, is_first, whole_here
from qlora_jax.training.auto import fitting
from qlora_jax.training.checks import check_examples
from qlora_jax.training.evaluation import HeldOut
from qlora_jax.training.interrupts import Interrupts
from qlora_jax.training.log import StepLog, due, rate_table
from qlora_jax.training.plot import plot_losses
from qlora_jax.training.report import MetricsFile, Progress, Silence
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.step import TrainState, make_train_step
from qlora_jax.training.stream import StepBatches

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
    model: AnyModel,
    config: lora.LoraConfig | lora.VeraConfig,
    train: TokenizedDataset,
    settings: TrainSettings,
    output: str | Path,
    *,
    evaluation: TokenizedDataset | None = None,
    adapters: lora.Adapters | None = None,
    optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    display: bool = True,
) -> FitResult:
    """Trains adapters of `model` on `train` and saves them in `output`, in PEFT's format.

    train: of `tokenize` for a decoder, `tokenize_seq2seq` for an encoder-decoder,
    `tokenize_labelled` for an encoder that classifies.

    adapters: to go on from, by default new ones by `config`. optimizer: instead of AdamW on the
    settings' schedule. mesh: of `make_mesh`, to split the model and each batch over; with several
    processes all of them call `fit` alike, and the first one writes. display: progress on the
    terminal.

    Beside the adapter, `output` gets loss.png and metrics.jsonl, with two kinds of lines. Of a
    step: step (from 1), loss (nats per labelled token, before the update), grad_norm (before
    clipping), learning_rate (not with an optimizer of one's own), tokens (labelled),
    tokens_per_second (all but padding), memory_bytes (peak), seconds (of this step),
    input_seconds (that its batch was waited for). Of an evaluation: step, eval_loss, eval_tokens.

    The first Ctrl-C ends the run after the step that is under way, and what was trained is saved; a
    second one raises KeyboardInterrupt. Raises QloraError if `output` has an adapter already, for
    examples longer than the settings' sequence length or the model's context, for ids outside its
    vocabulary, and if the loss or the gradient is not finite; then no adapter is saved.
    """
    output = Path(output)
    if (output / peft.WEIGHTS).exists():
        raise QloraError(f"{output}: has an adapter already; choose another folder, or delete it")
    # Said now, not when the run is over and its result would be lost.
    for package, purpose, extra in _NEEDED_AT_THE_END:
        if importlib.util.find_spec(package) is None:
            raise missing(package, purpose, extra)
    for examples in (train, evaluation):
        if examples is not None:
            check_examples(model, examples)
    layout = None if mesh is None else Layout.of(mesh, model.config)
    if layout is not None:
        layout.batch_sharding((settings.batch_size,))  # refused now if it cannot be split
    stream = StepBatches(train, settings)
    steps = stream.steps
    rates = None if optimizer else rate_table(settings.learning_rates(steps), steps)
    own, optimizer = optimizer, optimizer or settings.make_optimizer(steps)
    keys = jax.random.split(jax.random.key(settings.seed))

    def start(adapters: lora.Adapters | None, params: Any, keys: Any) -> TrainState:
        if adapters is None:
            adapters = lora.init(keys[0], params, config)
        return TrainState.create(adapters, optimizer, keys[1])

    if settings.memory == "auto":
        shapes = jax.eval_shape(start, adapters, model.params, keys)
        settings, chosen = fitting(model, settings, shapes, stream[0], layout, may_page=own is None)
        optimizer = own or settings.make_optimizer(steps)
        if display and is_first():
            print(chosen)

    shardings, examples_axis = None, int(settings.accumulate > 1)
    if layout is None:
        state = start(adapters, model.params, keys)
    else:
        model = dataclasses.replace(model, params=layout.params(model.params))
        state = layout.build(start, adapters, model.params, keys)
        shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(
        functools.partial(model.loss, remat=settings.remat),
        optimizer,
        max_grad_norm=settings.max_grad_norm,
        accumulate=settings.accumulate,
        dropout=config.dropout,
        state_shardings=shardings,
    )
    held_out = None
    if evaluation is not None:
        held_out = HeldOut(model, evaluation, settings, layout)
    writes = is_first()
    if writes:
        output.mkdir(parents=True, exist_ok=True)

    def save(folder: Path) -> None:
        whole = whole_here(state.adapters)
        if writes:
            peft.save(folder, whole, model, config)

    began, number, interrupted = time.perf_counter(), 0, False
    with (
        Interrupts() as interrupts,
        MetricsFile(output / "metrics.jsonl" if writes else None) as metrics,
        Progress(steps) if display and writes else Silence() as progress,
    ):
        log = StepLog(metrics, progress, settings.log_every, steps, rates)
        for number, batch in enumerate(stream.start(), start=1):
            placed = batch if layout is None else layout.batch(batch, examples_axis)
            state, measured = step(state, model.params, placed)
            log.dispatched(number, measured, int(batch["attention_mask"].sum()), stream.waited)
            last = number == steps
            evaluating = held_out is not None and (last or due(number, settings.eval_every))
            saving = not last and due(number, settings.save_every)
            if not (evaluating or saving or last or interrupts.caught):
                continue
            log.catch_up(write=last or interrupts.caught)
            if saving:
                save(output / f"step-{number}")
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
        save(output)
        if writes:
            plot_losses(output / "loss.png", metrics.history)
    seconds = time.perf_counter() - began
    return FitResult(state.adapters, metrics.history, number, seconds, interrupted)
