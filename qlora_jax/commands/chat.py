"""`qlora-jax chat`: a conversation in the terminal."""

import dataclasses
from pathlib import Path

from qlora_jax.commands.options import ModelOptions, need_tokenizer, with_adapter
from qlora_jax.data import Message
from qlora_jax.errors import QloraError
from qlora_jax.generation import Sampling, need_text_model, prompt_ids, stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(ModelOptions):
    """Talk to a model in the terminal. An empty line or Ctrl-D ends it; /new starts over.

    Ctrl-C ends an answer.
    """

    adapter: Path | None = None
    """Folder of a PEFT adapter. Give --quantization, --block-size and --double-quant as in its
    training."""
    system: str | None = None
    """A first message that tells the model how to behave."""
    sampling: Sampling = Sampling(temperature=0.7, top_p=0.9)
    """How tokens are chosen."""

    def run(self) -> None:
        """Reads lines and prints answers until the end. What goes wrong with one turn, such as a
        conversation beyond the model's context, is said, and the turn taken back."""
        model = self.load()
        need_text_model(model)
        need_tokenizer(model)
        params = with_adapter(model, self.adapter)
        opening = [] if self.system is None else [Message("system", self.system)]
        messages = list(opening)
        print(f"{model}\nAn empty line ends it, /new starts over, Ctrl-C ends an answer.")
        while True:
            try:
                text = input("\nyou> ").strip()
            except EOFError:
                print()
                return
            if not text:
                return
            if text == "/new":
                messages = list(opening)
                continue
            messages.append(Message("user", text))
            pieces: list[str] = []
            try:
                ids = prompt_ids(model, messages)
                for piece in stream(model, ids, self.sampling, params=params):
                    pieces.append(piece)
                    print(piece, end="", flush=True)
            except QloraError as error:
                messages.pop()
                print(f"{error}\n(your last line is taken back; /new starts over)")
                continue
            except KeyboardInterrupt:
                print(" (stopped)", end="")
            print()
            messages.append(Message("assistant", "".join(pieces)))
