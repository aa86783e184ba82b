"""Entries of JSON objects that other programs wrote, each checked for its type."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from qlora_jax.errors import QloraError

T = TypeVar("T")
_NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    list: "a list",
    Mapping: "an object",
}


def entry(content: Mapping[str, Any], key: str, kind: type[T], default: Any = None) -> Any:
    """content[key], which must be a `kind` (one of `_NAMES`); `default` where it is null or absent.

    A whole number serves as a float, and becomes one. Raises QloraError that names the key.
    """
    value = content.get(key)
    return default if value is None else checked(key, value, kind)


def needed(content: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """As `entry`, of what must be there."""
    if content.get(key) is None:
        raise QloraError(f"{key} is missing; expected {_NAMES[kind]}")
    return checked(key, content[key], kind)


def checked(key: str, value: Any, kind: type[T]) -> T:
    """`value`, which `key` names in the error if it is no `kind`."""
    if kind is float and type(value) is int:
        value = float(value)
    # To Python true is the number 1, and NaN, which its JSON reader takes, a float like others.
    odd = isinstance(value, bool) and kind is not bool
    odd = odd or (isinstance(value, float) and not math.isfinite(value))
    if odd or not isinstance(value, kind):
        raise QloraError(f"{key} is {value!r}, expected {_NAMES[kind]}")
    return cast(T, value)
