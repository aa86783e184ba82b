"""Where SmolLM2-135M-Instruct lies on this machine."""

from qlora_jax.commands.smollm2 import gguf

__all__ = ["gguf"]
