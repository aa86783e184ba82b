"""The largest number that fits, by as few trials as can be."""

import dataclasses
from collections.abc import Callable

Bytes = Callable[[int], int | None]
"""What a trial of a number takes; None: more than there is, and nobody says how much."""


@dataclasses.dataclass(frozen=True)
class Largest:
    """fits: the largest number that was seen to fit, 0 if none was. fails: the smallest that was
    seen not to, None if none was. exact: whether nothing between the two is left to try."""

    fits: int
    fails: int | None
    exact: bool


def largest(
    trial: Bytes,
    room: int,
    known: dict[int, int | None],
    most: int,
    *,
    step: int = 1,
    trials: int = 3,
    guess: int | None = None,
) -> Largest:
    """Bisects for the largest multiple of `step` up to `most` for which `trial` is within `room`.

    known: what is known already, from a trial of one number at least. Bytes are taken to grow
    about linearly, so that the next number to try is where the line through two trials meets
    `room`. guess: which to try first. After `trials` trials what was found by then is returned.
    """
    known = dict(known)
    while True:
        fits = max((n for n, size in known.items() if size is not None and size <= room), default=0)
        fails = min((n for n, size in known.items() if size is None or size > room), default=None)
        exact = fits >= most or (fails is not None and fails - fits <= step)
        if exact or trials == 0:
            return Largest(fits, fails, exact)
        end = most + step if fails is None else fails
        wanted = guess if guess is not None else _crossing(known, room, fits, end)
        guess = None
        # Of the numbers strictly between the two; `most` itself need not be a multiple.
        number = min(max(wanted // step * step, (fits // step + 1) * step), most)
        if number >= end:
            number = max((end - 1) // step * step, fits + 1)
        known[number] = trial(number)
        trials -= 1


def _crossing(known: dict[int, int | None], room: int, fits: int, end: int) -> int:
    """Where the line through the two trials next to `room` meets it; half-way without two."""
    sizes = sorted(
        ((n, size) for n, size in known.items() if size is not None),
        key=lambda pair: abs(pair[1] - room),
    )
    if len(sizes) < 2 or sizes[0][1] == sizes[1][1]:
        return (fits + end) // 2
    (a, at_a), (b, at_b) = sizes[:2]
    return int(a + (room - at_a) * (b - a) / (at_b - at_a))
