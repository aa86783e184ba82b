"""`qlora-jax train`: fine-tune a model on a data set."""

import dataclasses
from pathlib import Path

import jax

from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.export import save_pretrained
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.quantized import save_quantized
from qlora_jax.commands.options import ModelOptions, need_tokenizer, program
from qlora_jax.data import read_examples, tokenize
from qlora_jax.data.tokenize import Template
from qlora_jax.errors import QloraError
from qlora_jax.lora import Adapters, LoraConfig, count, init_quantized
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.trainer import fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(ModelOptions):
    """Fine-tune a model on a data set: QLoRA, or LoRA with --quantization none."""

    data: str
    """A JSON lines file, or a data set on the Hugging Face hub, "owner/name[:config][@split]" (of
    the split "train" if none is named). Rows are {"messages": [...]}, {"prompt", "completion"} or
    {"question", "answer"}."""
    output: Path
    """Folder for the adapter (PEFT's format), metrics.jsonl and loss.png."""
    eval_data: str | None = None
    """Held-out rows, from the same kinds of places; not the rows of --data."""
    eval_count: int = 0
    """Without --eval-data: hold out so many rows from the end of --data."""
    max_length: int = 1024
    """Tokens of an example; longer ones are cut on the right."""
    template: Template = "auto"
    """chat: the tokenizer's chat template; plain: prompt, then answer; auto: chat if it has one."""
    adapter: Path | None = None
    """Go on from this PEFT adapter instead of a new one (its settings replace --lora)."""
    lora: LoraConfig = LoraConfig()
    """The adapters."""
    training: TrainSettings = TrainSettings()
    """The run."""

    def run(self) -> None:
        """Trains and writes the output folder. Raises QloraError for bad input, most of it before
        the model is loaded."""
        if (self.output / peft.WEIGHTS).exists():  # said before the model is loaded, not after
            raise QloraError(f"{self.output}: has an adapter already; choose another --output")
        examples = read_examples(self.data)
        held_out = read_examples(self.eval_data) if self.eval_data else []
        if [row.messages for row in held_out] == [row.messages for row in examples]:
            raise QloraError(
                f"--eval-data {self.eval_data} has the same rows as --data {self.data}; give "
                'others, of the hub another split ("owner/name@test"), or hold some out by '
                "--eval-count"
            )
        if not held_out and self.eval_count:
            if not 0 < self.eval_count < len(examples):
                raise QloraError(
                    f"--eval-count {self.eval_count} leaves none of {len(examples)} rows to train"
                )
            examples, held_out = examples[: -self.eval_count], examples[-self.eval_count :]
        taken_out = self.adapter is None and self.lora.changes_base
        model = self.load(dense=taken_out)
        print(model)
        need_tokenizer(model)
        train = tokenize(examples, model.tokenizer, self.max_length, self.template)
        print(f"training: {train}")
        evaluation = None
        if held_out:
            evaluation = tokenize(held_out, model.tokenizer, self.max_length, self.template)
            print(f"held out: {evaluation}")
        config, adapters = self.lora, None
        if self.adapter is not None:
            adapters, config = peft.load(self.adapter, model)
        elif taken_out:
            model, adapters = self._take_out(model)
        result = fit(
            model,
            config,
            train,
            self.training,
            self.output,
            evaluation=evaluation,
            adapters=adapters,
        )
        print(f"{count(result.adapters):,} parameters trained; adapter in {self.output}")
        base = model.source if taken_out else self.model
        print(f"try it: {program()} chat --model {base} --adapter {self.output}")

    def _take_out(self, model: Model) -> tuple[Model, Adapters]:
        """The base that --lora.init leaves of a dense model, which is written, and the adapters."""
        base, format = self.output / "base", self.format()
        key = jax.random.key(self.training.seed)
        params, adapters = init_quantized(key, model.params, self.lora, format)
        model = dataclasses.replace(model, params=params, source=str(base))
        if format is None:
            save_pretrained(base, model, dtype=model.dtype)
        else:
            save_quantized(base, model)
        print(f"{self.lora.init}: the adapter belongs to the base in {base}, not to {self.model}")
        return model, adapters
