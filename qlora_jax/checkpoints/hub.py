"""Models by their names on the Hugging Face hub."""

import re
from pathlib import Path

from qlora_jax.errors import QloraError, missing, reason

_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "vocab*", "merges.txt")
# The same weights once more, in the layout of their authors' own programs.
_NOT = ("consolidated*", "original/*")
_NAME = r"[\w.-]+/[\w.-]+"


def download(name: str) -> Path:
    """The folder with the files of "owner/model", downloaded or from the hub's own cache.

    Raises QloraError if `name` is no such name, or the hub does not have or give it.
    """
    if not re.fullmatch(_NAME, name):
        raise QloraError(f"{name}: no such file or folder, and no name of a model (owner/model)")
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise missing("huggingface_hub", f"downloading {name}", "hf") from error
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=list(_FILES), ignore_patterns=list(_NOT)
        )
        return Path(folder)
    # The hub's client raises errors of its own, of httpx and of requests, by version.
    except Exception as error:
        raise QloraError(
            f"{name}: no such file or folder here, and not to be had from the Hugging Face hub "
            f"({reason(error)})"
        ) from error
