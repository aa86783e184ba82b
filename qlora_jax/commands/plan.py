"""`qlora-jax plan`: what a training run takes of a device, before it is rented."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qlora_jax.checkpoints.hub import download_config
from qlora_jax.checkpoints.json_files import read_json
from qlora_jax.cli import parse
from qlora_jax.commands.options import DType, Format
from qlora_jax.commands.train import Train
from qlora_jax.errors import QloraError
from qlora_jax.lora import LoraConfig
from qlora_jax.models import T5Config, read_config
from qlora_jax.models.remat import RematPolicy
from qlora_jax.plan import chart, devices, report
from qlora_jax.plan.compiling import Compiler
from qlora_jax.plan.planner import Plan as Result
from qlora_jax.plan.planner import Planner, with_memory_chosen
from qlora_jax.plan.workload import Workload, context
from qlora_jax.quant import NF4, QuantConfig
from qlora_jax.training.settings import OptimizerName, TrainSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Know before you rent: compile a train step for a device that is not here, and see where its
    memory goes, whether it fits, and how large batch and sequence may be."""

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    """A folder with config.json, such a file, or a model's name on the Hugging Face hub, of which
    that file alone is downloaded. Not needed with --recipe."""
    device: str
    """a6000, 4090, h100, ..., or a TPU with its topology: v5e:2x4, v5p:2x2x1. An unknown one gets
    a list of all."""
    recipe: Path | None = None
    """A YAML file as `train --config` takes it; the options here win over what it says."""
    batch: int | None = None
    """Rows of a micro-batch, on all devices together (--training.batch-size of train); one for each
    device that rows are split over."""
    sequence: int | None = None
    """Tokens of a row; 512 or the model's context, or of a recipe its training.sequence_length or
    else the most that its lengths of examples allow."""
    rank: int | None = None
    """R of the adapters; 64 on all linear layers."""
    mesh: str | None = None
    """How several devices share the work, "data=2,fsdp=4", as of train; fsdp over all of them."""
    accumulate: int | None = None
    """Micro-batches in a step; 1."""
    remat: RematPolicy | None = None
    """What the backward pass keeps, as of train; full."""
    optimizer: OptimizerName | None = None
    """As of train; adamw."""
    paged: bool = False
    """Keep the optimizer's state in the host's memory, where a recipe does not say so already."""
    quantization: Format | None = None
    """Of the frozen weights; nf4."""
    dtype: DType | None = None
    """Of the computation; bfloat16."""
    trials: int = 2
    """Compiles spent on each of the largest batch and the largest sequence; 0: neither is looked
    for."""
    estimate: bool = False
    """By formula, at once, without a compiler."""
    compilers: Path | None = None
    """Folder of the compilers (tpu/, gpu/, cuda/); by default that of QLORA_JAX_COMPILERS, what is
    installed, or ~/.cache/qlora-jax/compilers."""
    json: bool = False
    """Print numbers for programs, in bytes."""
    plot: Path | None = None
    """Draw the parts into this image, .png, .svg or .pdf."""

    def run(self) -> None:
        """Prints the plan. Raises QloraError for what there is not, and where the compiler is not
        installed."""
        # A device that happens to be here is not needed, and may be busy.
        import jax

        jax.config.update("jax_platforms", "cpu")
        result = self.plan()
        if self.json:
            print(json.dumps(report.to_json(result), indent=2))
        else:
            chart.show(result)
        if self.plot is not None:
            chart.plot(result, self.plot)

    def plan(self) -> Result:
        """The plan, unprinted."""
        device = devices.find(self.device)
        workload = self.workload(device.count)
        # What is wrong with it is said before a compiler is looked for.
        workload.config()
        workload.axes(device.count)
        if self.trials < 0:
            raise QloraError(f"--trials must not be negative, got {self.trials}")
        if workload.training.memory == "auto" and self.remat is None and not self.paged:
            workload = with_memory_chosen(workload, device)
        question = functools.partial(Planner, workload, device, shorter=self._shorter(workload))
        if self.estimate:
            return question(None).plan(trials=self.trials)
        with Compiler(device, self.compilers) as compiler:
            return question(compiler).plan(trials=self.trials)

    @functools.cached_property
    def _train(self) -> Train | None:
        """The recipe."""
        return self.recipe and parse(Train, ["--config", str(self.recipe)], "recipe")

    def _shorter(self, workload: Workload) -> Callable[[int], str]:
        """What one would give to `train` for shorter sequences."""
        train = self._train
        if train is None:
            return "--max-length {}".format
        encoder_decoder = isinstance(workload.config(), T5Config)
        padded = train.training.sequence_length is not None

        def options(tokens: int) -> str:
            cut = train.cut_to(tokens, encoder_decoder)
            return f"{cut} --training.sequence-length {tokens}" if padded else cut

        return options

    def workload(self, count: int = 1) -> Workload:
        """What is to be planned: the recipe's, or usual settings, with the options put in. count:
        of devices."""
        train = self._train
        if train is None:
            if self.model is None:
                raise QloraError("which MODEL? Give a folder, a config.json or a name, or --recipe")
            model, lora = self.model, LoraConfig(rank=64, alpha=16)
            training = TrainSettings(batch_size=1, remat="full")
            time, form, dtype, mesh = None, NF4(), "bfloat16", None
        else:
            model, lora, training = self.model or train.model, train.lora, train.training
            time = training.sequence_length
            form = _form(train.quantization, train.block_size, train.double_quant)
            dtype, mesh = train.dtype, train.mesh
        training = dataclasses.replace(
            training,
            sequence_length=None,
            batch_size=training.batch_size if self.batch is None else self.batch,
            accumulate=training.accumulate if self.accumulate is None else self.accumulate,
            remat=self.remat or training.remat,
            optimizer=self.optimizer or training.optimizer,
            paged=self.paged or training.paged,
        )
        if self.rank is not None:
            lora = dataclasses.replace(lora, rank=self.rank)
        if self.quantization is not None:
            form = _form(self.quantization, None, True)
        dtype, about = self.dtype or dtype, read_about(model)
        config = read_config(about)
        time = time if self.sequence is None else self.sequence
        if time is None:
            usual = USUAL if train is None else train.longest(isinstance(config, T5Config))
            time = min(usual, context(config) or usual)
        workload = Workload(
            about=about,
            time=time,
            lora=lora,
            training=training,
            quantization=form,
            dtype="bfloat16" if dtype == "auto" else dtype,
            mesh=self.mesh or mesh,
        )
        if train is None and self.batch is None:
            return workload.with_training(batch_size=workload.rows(count))
        return workload


USUAL = 512
"""Tokens of a row, where nobody says otherwise."""


def _form(
    name: Literal["auto", "nf4", "fp4", "none"], block_size: int | None, double_quant: bool
) -> QuantConfig | None:
    if name == "none":
        return None
    return QuantConfig("nf4" if name == "auto" else name, block_size or 64, double_quant)


def read_about(model: str) -> dict:
    """The config.json of a folder, of that file itself, or of a model on the hub."""
    path = Path(model).expanduser()
    if path.is_dir():
        path /= "config.json"
    if not path.exists() and path.suffix != ".json":
        path = download_config(model)
    return read_json(path)
