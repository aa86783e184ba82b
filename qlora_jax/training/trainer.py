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
from qlora_jax.data import Batch, TokenizedDataset
from qlora_jax.errors import missing
from qlora_jax.models.attention import use_attention
from qlora_jax.parallel import Layout, is_first, whole_here
from qlora_jax.training.auto import fitting
from qlora_jax.training.checkpoints import Checkpoint, RunCheckpoints, check_output
from qlora_jax.training.checks import checked
from qlora_jax.training.evaluation import HeldOut
from qlora_jax.training.interrupts import Interrupts
from qlora_jax.training.log import StepLog, rate_table
from qlora_jax.training.loop import Loop
from qlora_jax.training.plot import plot_losses
from qlora_jax.training.report import MetricsFile, Progress, Silence
from qlora_jax.training.resume import check_same, describe_run
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
    steps        how many were taken, before this run went on too
    seconds      of wall time, compiling and evaluating included
    interrupted  whether Ctrl-C or SIGTERM cut the run short
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
    resume: bool = False,
    display: bool = True,
) -> FitResult:
    """Trains adapters of `model` on `train` and saves them in `output`, in PEFT's format.

    train: of `tokenize` for a decoder, `tokenize_seq2seq` for an encoder-decoder,
    `tokenize_labelled` for an encoder that classifies.

    adapters: to begin with, by default new ones by `config`. optimizer: instead of AdamW on the
    settings' schedule. mesh: of `make_mesh`, to split the model and each batch over; with several
    processes all of them call `fit` alike, and the first one writes. resume: go on with the run in
    `output` from its newest checkpoint, as if it had never stopped; begin it if there is none.
    display: progress on the terminal.

    Beside the adapter, `output` gets checkpoints (step-N), loss.png and metrics.jsonl, with two
    kinds of lines. Of a step: step (from 1), loss (nats per labelled token, before the update) and
    grad_norm (before clipping), both if finite, learning_rate (not with an optimizer of one's own),
    tokens (labelled), skipped (how many steps were skipped so far, since loss or gradient was not
    finite), tokens_per_second (all but padding), memory_bytes (peak), seconds (of this step),
    input_seconds (that its batch was waited for). Of an evaluation: step, eval_loss (if finite),
    eval_tokens.

    Ctrl-C or SIGTERM ends the run after the step that is under way, and what was trained is saved;
    a second Ctrl-C raises KeyboardInterrupt (with several processes the first). Raises QloraError
    if `output` has a run already and `resume` is off, or another run (or an adapter and no
    checkpoint) and it is on, for examples
    longer than the settings' sequence length or the model's context, for ids outside its
    vocabulary, if a checkpoint cannot be written, and after `max_skipped` skipped steps in a row;
    then the state is saved as it was before them.
    """
    output = Path(output).expanduser()
    checkpoints = RunCheckpoints(output, settings.keep)
    check_output(output, resume)
    # Said now, not when the run is over and its result would be lost.
    for package, purpose, extra in _NEEDED_AT_THE_END:
        if importlib.util.find_spec(package) is None:
            raise missing(package, purpose, extra)
    train = checked(model, train)
    evaluation = None if evaluation is None else checked(model, evaluation)
    layout = None if mesh is None else Layout.of(mesh, model.config)
    rows = None if layout is None else layout.own_rows(settings.batch_size)
    stream = StepBatches(train, settings, rows)
    steps = stream.steps
    about = describe_run(model, config, train, settings, steps, own_optimizer=bool(optimizer))
    rates = None if optimizer else rate_table(settings.learning_rates(steps), steps)
    transform = optimizer or settings.make_optimizer(steps)
    keys = jax.random.split(jax.random.key(settings.seed))

    def start(adapters: lora.Adapters | None, params: Any, keys: Any) -> TrainState:
        if adapters is None:
            return TrainState.create(lora.init(keys[0], params, config), transform, keys[1])
        return TrainState.create(adapters, transform, keys[1])

    shapes = jax.eval_shape(start, adapters, model.params, keys)
    peft.check(shapes.adapters, model, config)  # now, not when they are trained
    if settings.memory == "auto":
        largest = StepBatches(train, settings).largest()
        settings, chosen = fitting(
            model, settings, shapes, largest, layout, may_page=optimizer is None
        )
        transform = optimizer or settings.make_optimizer(steps)
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
        transform,
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

    def place(batch: Batch) -> Any:
        if layout is None:
            return batch
        return layout.own_batch(batch, settings.batch_size, examples_axis)

    began, number, counts = time.perf_counter(), 0, {}
    saved = checkpoints.newest(print if writes else _quiet) if resume else None
    if saved is not None:
        check_same(output, saved.run, about)
        state, number, counts = checkpoints.restore(saved, state), saved.step, saved.counts
    with (
        Interrupts() as interrupts,
        checkpoints,
        MetricsFile(output / "metrics.jsonl", until=number, write=writes) as metrics,
        Progress(steps, number) if display and writes else Silence() as progress,
        use_attention(settings.attention),
    ):
        if resume:
            progress.say(_standing(output, saved, steps))
        loop = Loop(
            model=model,
            config=config,
            settings=settings,
            output=output,
            about=about,
            stream=stream,
            place=place,
            step=step,
            held_out=held_out,
            checkpoints=checkpoints,
            interrupts=interrupts,
            metrics=metrics,
            progress=progress,
            log=StepLog(metrics, progress, settings.log_every, rates, counts),
            state=state,
            number=number,
        )
        finished = saved is not None and saved.finished
        if not finished:
            finished = loop.go_on()
            if not finished:
                progress.say(
                    f"interrupted after step {loop.number} ({interrupts.caught}): what was trained "
                    "is saved, --resume goes on from there"
                )
            whole = whole_here(loop.state.adapters)
            if writes:
                peft.save(output, whole, model, config)
                plot_losses(output / "loss.png", metrics.history)
                if finished:
                    checkpoints.finish(loop.number)
    seconds = time.perf_counter() - began
    return FitResult(loop.state.adapters, metrics.history, loop.number, seconds, not finished)


def _quiet(_: str) -> None:
    """Says nothing."""


def _standing(output: Path, saved: Checkpoint | None, steps: int) -> str:
    """Where a run that is to go on stands."""
    if saved is None:
        return f"{output}: no checkpoint to go on from, the run begins"
    if saved.finished:
        return f"{output}: the run is finished, all {steps} steps of it"
    return f"{output}: going on after step {saved.step} of {steps}"
