"""Writing so that nothing half-written is ever mistaken for something whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.errors import QloraError


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when all is written, and vanishes if not.

    Raises as `check_new`.
    """
    check_new(folder)
    folder = folder.resolve()  # a link cannot be replaced by a folder, what it leads to can
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Raises QloraError if `folder` is there and not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise QloraError(f"{folder}: already there; choose another folder, or delete it first")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to that replaces `path` when all is written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
