"""Models by their names on the Hugging Face hub."""

import functools
import re
from pathlib import Path
from typing import Any

from qlora_jax.errors import QloraError, missing, reason

_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "vocab*", "merges.txt")
# What torch.save wrote, where nothing better is there.
_OLD = ("pytorch_model*.bin",)
# The same weights once more, in the layout of their authors' own programs.
_NOT = ("consolidated*", "original/*")
_NAME = r"[\w.-]+/[\w.-]+"


def download(name: str) -> Path:
    """The folder with the files of "owner/model", downloaded or from the hub's own cache.

    Raises QloraError if `name` is no such name, or the hub does not have or give it.
    """
    huggingface_hub = _client(name)
    try:
        fetch = functools.partial(
            huggingface_hub.snapshot_download, name, ignore_patterns=list(_NOT)
        )
        folder = Path(fetch(allow_patterns=list(_FILES)))
        if not any(folder.glob("model*.safetensors")):
            fetch(allow_patterns=list(_OLD))
        return folder
    # The hub's client raises errors of its own, of httpx and of requests, by version.
    except Exception as error:
        raise _not_to_be_had(name, error) from error


def download_config(name: str) -> Path:
    """The config.json of "owner/model" alone; otherwise as `download`."""
    huggingface_hub = _client(name)
    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except Exception as error:
        raise _not_to_be_had(name, error) from error


def _client(name: str) -> Any:
    if not re.fullmatch(_NAME, name):
        raise QloraError(f"{name}: no such file or folder, and no name of a model (owner/model)")
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise missing("huggingface_hub", f"downloading {name}", "hf") from error
    return huggingface_hub


def _not_to_be_had(name: str, error: Exception) -> QloraError:
    return QloraError(
        f"{name}: no such file or folder here, and not to be had from the Hugging Face hub "
        f"({reason(error)})"
    )
