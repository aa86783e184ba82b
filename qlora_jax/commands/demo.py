"""`qlora-jax demo`: the whole way, from a checkpoint to a trained adapter, on this machine."""

import dataclasses
import itertools
import time
from pathlib import Path

import jax

from qlora_jax import demo_task, lora
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.load import load
from qlora_jax.commands import smollm2
from qlora_jax.commands.options import need_tokenizer, program
from qlora_jax.data import rows_to_examples, tokenize
from qlora_jax.errors import QloraError, missing
from qlora_jax.generation import Sampling, complete
from qlora_jax.lora import LoraConfig
from qlora_jax.quant import NF4
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.trainer import fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Fine-tune SmolLM2-135M in 4 bits to turn order notes into strict records.

    The model is downloaded once. The task is made by qlora_jax/demo_task.py; the test notes use
    sentences, names, items and cities that do not occur in training.
    """

    output: Path | None = None
    """Folder for the adapter (PEFT's format), metrics.jsonl and loss.png; None: the first of
    demo-output, demo-output-2, ... that has none yet."""
    model: str | None = None
    """Another model: a folder, a .gguf file or a name on the Hugging Face hub."""
    training: TrainSettings = TrainSettings(
        steps=72,
        batch_size=4,
        learning_rate=1.5e-3,
        schedule="linear",
        warmup=0.1,
        max_grad_norm=1.0,
    )
    """The run."""
    lora: LoraConfig = LoraConfig()
    """The adapters."""
    test_examples: int = 48
    """Held-out notes that are answered before and after."""

    def run(self) -> None:
        """Downloads, answers, trains, answers again, and prints the comparison."""
        try:
            from rich.console import Console
            from rich.table import Table
        except ModuleNotFoundError as error:
            raise missing("rich", "the demo's tables", "cli") from error
        output = self.output or _free_folder()
        if (output / peft.WEIGHTS).exists():
            raise QloraError(f"{output}: has an adapter already; choose another --output")
        console = Console(highlight=False)
        source = self.model or smollm2.find()
        started = time.perf_counter()
        model = load(source, quantization=NF4())
        need_tokenizer(model)
        console.print(f"{model} after {time.perf_counter() - started:.0f} s", markup=False)
        console.print(f"a weight: {model.params['layers']['mlp']['up_proj']['kernel']}")

        size = self.training.batch_size * self.training.accumulate
        rows = demo_task.make_examples("train", size * self.training.steps_for(512))
        train = tokenize(rows_to_examples(rows), model.tokenizer, 512)
        test = rows_to_examples(demo_task.make_examples("test", self.test_examples))
        references = [example.answer for example in test]
        sampling = Sampling(max_new_tokens=64)

        def answers(params: object) -> list[str]:
            prompts = [example.prompt for example in test]
            return complete(model, prompts, sampling, params=params, batch_size=len(prompts))

        console.print(f"answering {len(test)} held-out notes, before training ...")
        before = answers(model.params)
        console.print(f"exact match: {demo_task.exact_match(before, references):.0%}")
        adapters = lora.init(jax.random.key(self.training.seed), model.params, self.lora)
        console.print(
            f"training {lora.count(adapters):,} parameters on {train} (Ctrl-C ends it early)"
        )
        result = fit(model, self.lora, train, self.training, output, adapters=adapters)
        console.print(f"answering the {len(test)} held-out notes again ...")
        after = answers(lora.attach(model.params, result.adapters))

        table = Table(title="Held-out notes", show_lines=True)
        for heading in ("note", "before", "after", "right"):
            table.add_column(heading, overflow="fold")
        for example, old, new in list(zip(test, before, after, strict=True))[:4]:
            right = "yes" if new.strip() == example.answer else "no"
            table.add_row(example.prompt[-1].content, _shortened(old), _shortened(new), right)
        console.print(table)
        scores = [demo_task.exact_match(x, references) for x in (before, after)]
        console.print(
            f"exact match on {len(test)} held-out notes: {scores[0]:.0%} -> {scores[1]:.0%}"
        )
        console.print(
            f"In {output}: the adapter (PEFT loads it), metrics.jsonl and loss.png. Next:\n"
            f"  {program()} chat --model {source} --adapter {output}\n"
            f"  {program()} merge --model {source} --adapter {output} --output merged\n"
            f"  {program()} train --help    # with data of your own",
            markup=False,
            soft_wrap=True,
        )


def _free_folder() -> Path:
    names = itertools.chain(["demo-output"], (f"demo-output-{n}" for n in itertools.count(2)))
    return next(path for path in map(Path, names) if not (path / peft.WEIGHTS).exists())


def _shortened(text: str, length: int = 200) -> str:
    text = text.strip()
    return text if len(text) <= length else text[: length - 3] + "..."
