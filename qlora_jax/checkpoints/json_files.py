"""JSON as checkpoints have it: one object, in which no name stands twice."""

import json
from pathlib import Path
from typing import Any

from qlora_jax.errors import QloraError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; QloraError if it holds anything else."""
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise QloraError(f"{path} is not there") from error
    except NotADirectoryError as error:
        raise QloraError(f"{path} is not there, since {path.parent} is no folder") from error
    except IsADirectoryError as error:
        raise QloraError(f"{path} is a folder; expected a JSON file") from error
    except QloraError as error:
        raise QloraError(f"{path}: {error}") from error


def parse_json(text: bytes) -> dict[str, Any]:
    """The JSON object that a text is; QloraError if it is anything else."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise QloraError(f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise QloraError(f"expected a JSON object, found {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no name may stand twice: readers differ in which one counts."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise QloraError(f"the name {double!r} stands in it twice")
    return content
