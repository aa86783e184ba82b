"""Rows to tokenized examples, by one process or by each of several a part."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax

from qlora_jax.data.collate import TokenizedExample
from qlora_jax.errors import QloraError
from qlora_jax.parallel.exchange import gather

Row = TypeVar("Row")


def convert(
    rows: Sequence[Row], one: Callable[[Row], tuple[TokenizedExample, bool] | None], share: bool
) -> tuple[tuple[TokenizedExample, ...], int]:
    """(what `one` makes of each row, how many of them were cut to a limit).

    one: the example and whether it was cut, or None for a row that is to be left out. share: each
    process converts a part of the rows, and they exchange the examples; all must call this
    together. Raises `one`'s QloraError, with `share` in all of them that of the first row that has
    one.
    """
    count = jax.process_count() if share else 1
    number = jax.process_index() if share else 0
    part = rows[len(rows) * number // count : len(rows) * (number + 1) // count]
    try:
        own: list[tuple[TokenizedExample, bool] | None] | QloraError = [one(row) for row in part]
    except QloraError as error:
        own = error  # the others wait for an answer, and are to fail too
    made = []
    for answer in gather(own) if share else [own]:
        if isinstance(answer, QloraError):
            raise answer
        made += [found for found in answer if found is not None]
    return tuple(example for example, _ in made), sum(cut for _, cut in made)
