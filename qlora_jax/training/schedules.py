"""Learning rates over a run: a rise, then what the name says."""

from typing import Literal

import optax

from qlora_jax.errors import QloraError

ScheduleName = Literal["constant", "linear", "cosine"]


def schedule(name: ScheduleName, peak: float, steps: int, warmup: int | float) -> optax.Schedule:
    """Step, counted from 0, -> learning rate, over a run of `steps`.

    It rises linearly to `peak` in `warmup` steps (an int) or that share of the run (a float from 0
    to 1), then stays (constant) or falls to zero at the end of the run (linear, cosine). Raises
    QloraError for another name, and for a warm-up that is longer than the run.
    """
    rising = round(warmup * steps) if isinstance(warmup, float) else warmup
    if not 0 <= rising <= steps:
        raise QloraError(f"a warm-up of {rising} steps does not fit a run of {steps}")
    rest = max(steps - rising, 1)
    after: optax.Schedule
    if name == "constant":
        after = optax.constant_schedule(peak)
    elif name == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif name == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    else:
        raise QloraError(f"schedule must be constant, linear or cosine, got {name!r}")
    if rising == 0:
        return after
    # The first step would have rate 0, and so be lost, if the rise began there.
    rise = optax.linear_schedule(peak / rising, peak, rising - 1)
    return optax.join_schedules([rise, after], [rising])
