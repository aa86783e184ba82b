"""What a person chooses about a training run."""

import dataclasses
from typing import Literal

import optax

from qlora_jax.errors import QloraError

ScheduleName = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """A training run; the defaults are those of QLoRA's own program where it has one."""

    steps: int | None = None
    """Optimizer steps; None: as many as `epochs` makes."""
    epochs: float = 1.0
    """Passes over the training examples, if `steps` is not given."""
    batch_size: int = 4
    """Examples in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in a step: the gradient is that of all of them."""
    learning_rate: float = 2e-4
    """Peak of the schedule."""
    schedule: ScheduleName = "constant"
    """How the rate falls after the warm-up: not at all, to zero linearly, or along a cosine."""
    warmup: float = 0.0
    """Share of the steps in which the rate rises from zero, from 0 to 1."""
    weight_decay: float = 0.0
    """AdamW's."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: float = 0.999
    """AdamW's decay of the mean of squared gradients."""
    max_grad_norm: float | None = 0.3
    """Gradients are clipped to this global norm."""
    remat: bool = False
    """Keep only each layer's input for the backward pass: less memory, a third more time."""
    seed: int = 0
    """Of the adapters' initial values, the order of examples, and dropout."""
    eval_every: int | None = None
    """Steps between evaluations; there is always one at the end."""
    save_every: int | None = None
    """Steps between adapters saved as output/step-N; there is always one at the end."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise QloraError(f"{name} must be at least 1, got {value}")
        for name in ("epochs", "learning_rate"):
            if getattr(self, name) <= 0:
                raise QloraError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise QloraError(f"warmup is a share of the steps, from 0 to 1, got {self.warmup}")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise QloraError(f"max_grad_norm must be positive or None, got {self.max_grad_norm}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise QloraError(f"schedule must be constant, linear or cosine, got {self.schedule!r}")

    def steps_for(self, examples: int) -> int:
        """How many steps the run over that many examples takes."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * examples / (self.batch_size * self.accumulate)))

    def learning_rates(self, steps: int) -> optax.Schedule:
        """Step -> learning rate, over a run of `steps`."""
        warmup = round(self.warmup * steps)
        rest = max(steps - warmup, 1)
        after: optax.Schedule
        if self.schedule == "linear":
            after = optax.linear_schedule(self.learning_rate, 0.0, rest)
        elif self.schedule == "cosine":
            after = optax.cosine_decay_schedule(self.learning_rate, rest)
        else:
            after = optax.constant_schedule(self.learning_rate)
        if warmup == 0:
            return after
        # The first step would have rate 0, and so be lost, if the rise began there.
        rise = optax.linear_schedule(self.learning_rate / warmup, self.learning_rate, warmup - 1)
        return optax.join_schedules([rise, after], [warmup])

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """AdamW on that schedule."""
        return optax.adamw(
            self.learning_rates(steps),
            b1=self.beta1,
            b2=self.beta2,
            weight_decay=self.weight_decay,
        )
