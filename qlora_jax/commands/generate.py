"""`qlora-jax generate`: answers to prompts."""

import dataclasses
import json
from pathlib import Path

from qlora_jax.commands.options import ModelOptions, need_tokenizer, with_adapter
from qlora_jax.data import Message
from qlora_jax.data.tokenize import Template
from qlora_jax.errors import QloraError
from qlora_jax.generation import Sampling, complete, prompt_ids, stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions):
    """Print a model's answer to a prompt, or write its answers to a file of prompts."""

    prompt: str | None = None
    """The prompt; its answer is printed as it comes."""
    prompts: Path | None = None
    """Instead: a text file, a prompt to a line. Answers are JSON lines {"prompt", "answer"}."""
    output: Path | None = None
    """Write those answers here instead of printing them."""
    adapter: Path | None = None
    """Folder of a PEFT adapter. Give --quantization, --block-size and --double-quant as in its
    training."""
    batch_size: int = 16
    """Prompts of a file that are answered together."""
    template: Template = "auto"
    """chat: the tokenizer's chat template; plain: the bare prompt; auto: chat if there is one."""
    sampling: Sampling = Sampling()
    """How tokens are chosen."""

    def run(self) -> None:
        """Prints or writes the answers. Raises QloraError for prompts that cannot be read."""
        if (self.prompt is None) == (self.prompts is None):
            raise QloraError("give one of --prompt and --prompts")
        lines: list[str] = []
        if self.prompts is not None:
            lines = _read_lines(self.prompts)
        if self.output is not None and not self.output.parent.is_dir():
            raise QloraError(f"{self.output}: there is no folder {self.output.parent}")
        if self.output is not None and self.output.is_dir():
            raise QloraError(f"{self.output}: a folder; --output takes a file")
        model = self.load()
        need_tokenizer(model)
        params = with_adapter(model, self.adapter)
        if self.prompt is not None:
            ids = prompt_ids(model, [Message("user", self.prompt)], self.template)
            for piece in stream(model, ids, self.sampling, params=params):
                print(piece, end="", flush=True)
            print()
            return
        answers = complete(
            model,
            [[Message("user", line)] for line in lines],
            self.sampling,
            params=params,
            batch_size=self.batch_size,
            template=self.template,
        )
        rows = [
            json.dumps({"prompt": line, "answer": answer}, ensure_ascii=False)
            for line, answer in zip(lines, answers, strict=True)
        ]
        if self.output is None:
            print("\n".join(rows))
        else:
            self.output.write_text("\n".join(rows) + "\n", encoding="utf-8")
            print(f"{len(rows)} answers in {self.output}")


def _read_lines(path: Path) -> list[str]:
    if path.is_dir():
        raise QloraError(f"{path}: a folder; --prompts takes a text file, a prompt to a line")
    if not path.is_file():
        raise QloraError(f"{path}: no such file")
    try:
        text = path.read_text("utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise QloraError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise QloraError(f"{path}: no prompts; expected one to a line")
    return lines
