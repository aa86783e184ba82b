"""Options of XLA's compiler, which come and go with its versions."""

import functools
from typing import Any

import jax


@functools.cache
def has(name: str, value: Any) -> bool:
    """Whether this XLA knows the option."""
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
