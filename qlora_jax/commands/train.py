"""`qlora-jax train`: fine-tune a model on a data set."""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import jax

from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.encoder import EncoderModel
from qlora_jax.checkpoints.export import save_pretrained
from qlora_jax.checkpoints.heads import with_head_in_full
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.quantized import save_quantized
from qlora_jax.commands.classes import write_labels
from qlora_jax.commands.data_options import DataOptions
from qlora_jax.commands.device_options import DeviceOptions
from qlora_jax.commands.options import ModelOptions, need_tokenizer, program
from qlora_jax.data import Labels
from qlora_jax.errors import QloraError
from qlora_jax.lora import Adapters, LoraConfig, count, init_quantized
from qlora_jax.models.classification import REGRESSION, SINGLE_LABEL
from qlora_jax.models.encoder_config import CLASSIFICATION, default_labels
from qlora_jax.parallel import Layout, is_first, put_parameter
from qlora_jax.training.checkpoints import check_output, day_of, is_begun, is_finished
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.trainer import fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(DataOptions, DeviceOptions, ModelOptions):
    """Fine-tune a model on a data set: QLoRA, or LoRA with --quantization none."""

    output: Path
    """Folder for the adapter (PEFT's format), checkpoints, metrics.jsonl and loss.png."""
    resume: bool = False
    """Go on with the run in --output from its newest checkpoint, with the same settings; begin it
    if there is none."""
    adapter: Path | None = None
    """Go on from this PEFT adapter instead of a new one (its settings replace --lora)."""
    lora: LoraConfig = LoraConfig()
    """The adapters."""
    training: TrainSettings = TrainSettings()
    """The run."""

    def run(self) -> None:
        """Trains and writes the output folder. Raises QloraError for bad input, most of it before
        the model is loaded."""
        # Said before the model is loaded, not after.
        check_output(self.output, self.resume)
        if self.resume and is_finished(self.output):
            print(
                f"{self.output}: the run is finished; to train its adapter further, begin another: "
                f"--adapter {self.output} --output FOLDER"
            )
            return
        mesh = self.open_mesh()
        train_rows, held_out, weights = self.read(self.training.seed)
        labels = self.labels(train_rows, held_out)
        taken_out = self.adapter is None and self.lora.changes_base
        if taken_out and jax.process_count() > 1:
            raise QloraError(
                f"--lora.init {self.lora.init} changes the base, which one process does alone: let "
                "it train a step, then go on from its base and --adapter"
            )
        place = functools.partial(put_parameter, mesh) if mesh and not taken_out else None
        model = self.load(dense=taken_out, place=place, **_head(labels))
        print(model)
        if labels is not None:
            model, labels = _named(model, labels)
        need_tokenizer(model)
        today = day_of(self.output) if self.resume else None
        train = self.tokenize_all(train_rows, weights, model, labels, today)
        print(f"training: {train}")
        evaluation = None
        if held_out:
            evaluation = self.tokenize_all(held_out, None, model, labels, train.today)
            print(f"held out: {evaluation}")
        encoder = isinstance(model, EncoderModel)
        config = with_head_in_full(self.lora, model.params) if encoder else self.lora
        adapters = None
        if self.adapter is not None:
            adapters, config = peft.load(self.adapter, model)
        elif taken_out:
            model, adapters = self._take_out(model, config)
        # The run makes its own: on the device there is to be room for one of each.
        adapters = jax.device_get(adapters)
        if mesh is not None:
            params = Layout.of(mesh, model.config).params(model.params)
            model = dataclasses.replace(model, params=params)
        result = fit(
            model,
            config,
            train,
            self.training,
            self.output,
            evaluation=evaluation,
            adapters=adapters,
            mesh=mesh,
            resume=self.resume,
        )
        if result.interrupted:
            return
        if isinstance(model, EncoderModel) and is_first():
            write_labels(self.output, model.config)
        print(f"{count(result.adapters):,} parameters trained; adapter in {self.output}")
        base = model.source if taken_out else self.model
        if isinstance(model, Model):
            # A base that was taken out is in its format already, unless that is none.
            words = "" if taken_out and self.format() else self.format_words()
            print(f"try it: {program()} chat --model {base}{words} --adapter {self.output}")

    def _take_out(self, model: Model, config: LoraConfig) -> tuple[Model, Adapters]:
        """The base that --lora.init leaves of a dense model, which is written, and the adapters."""
        base, format = self.output / "base", self.format()
        key = jax.random.key(self.training.seed)
        params, adapters = init_quantized(key, model.params, config, format)
        model = dataclasses.replace(model, params=params, source=str(base))
        begun = is_begun(self.output)
        if self.resume and not begun:
            shutil.rmtree(base, ignore_errors=True)  # an attempt's that did not come to train
        if begun and base.exists():
            pass  # made of the same weights by the same seed, which `fit` makes sure of
        elif format is None:
            save_pretrained(base, model, dtype=model.dtype)
        else:
            save_quantized(base, model)
        print(f"{self.lora.init}: the adapter belongs to the base in {base}, not to {self.model}")
        return model, adapters


def _head(labels: Labels | None) -> dict[str, Any]:
    """What `load` is told of the head that the labels need."""
    if labels is None:
        return {}
    if labels.names is None:
        return {"head": CLASSIFICATION, "num_labels": 1, "problem_type": REGRESSION}
    classes = len(labels.names)
    return {"head": CLASSIFICATION, "num_labels": classes, "problem_type": SINGLE_LABEL}


def _named(model: Any, labels: Labels) -> tuple[Any, Labels]:
    """Labels in the order of the model's head, if it has the same, else the model with theirs."""
    if labels.names is None or not isinstance(model, EncoderModel):
        return model, labels
    known = model.config.labels
    if set(labels.names) == set(known) or labels.names == default_labels(len(known)):
        labels = Labels(known)
    names = labels.names or ()
    print("labels:", ", ".join(f"{i} = {name}" for i, name in enumerate(names)))
    named = dataclasses.replace(model.config, labels=names)
    return dataclasses.replace(model, config=named), labels
