"""What a person chooses about a training run."""

import dataclasses
import math
from typing import Literal, get_args

import optax

from qlora_jax.data.lengths import check_shapes
from qlora_jax.errors import QloraError
from qlora_jax.models.attention import AttentionImplementation, use_attention
from qlora_jax.models.remat import RematPolicy, check_remat
from qlora_jax.training.adamw8bit import adamw8bit
from qlora_jax.training.lora_plus import lora_plus
from qlora_jax.training.paged import paged
from qlora_jax.training.schedules import ScheduleName, schedule

OptimizerName = Literal["adamw", "adamw8bit", "lion", "adafactor"]


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """A training run.

    The learning rate, its schedule, the weight decay and the clipping default to what QLoRA's own
    program takes. The batches and the length of the run do not: there a step is 16 micro-batches of
    one example each, with gradient checkpointing (`remat`), and a run 10000 steps.

    Raises QloraError for values out of range, and for both of steps and epochs.
    """

    steps: int | None = None
    """Optimizer steps; None: as many as `epochs` makes."""
    epochs: float | None = None
    """Passes over the training examples, instead of steps; one if neither is given."""
    batch_size: int = 4
    """Rows of a micro-batch: examples, or, with `packing`, as many examples as fit in each row."""
    accumulate: int = 1
    """Micro-batches in a step: the gradient is that of all of them."""
    learning_rate: float = 2e-4
    """Peak of the schedule."""
    loraplus_lr_ratio: float = 1.0
    """How many times as high it is for B (LoRA+, arXiv:2402.12354, suggests 16)."""
    schedule: ScheduleName = "constant"
    """How the rate falls after the warm-up: not at all, to zero linearly, or along a cosine."""
    warmup: int | float = 0
    """In how many steps the rate rises; with a decimal point: in what share of them, 0.0 to 1.0."""
    optimizer: OptimizerName = "adamw"
    """adamw8bit keeps its state in a quarter of the memory, adafactor and lion in half of it."""
    paged: bool = False
    """Keep the optimizer's state in the host's memory; it visits the device a page at a time."""
    weight_decay: float = 0.0
    """Of the weights, times the learning rate."""
    beta1: float = 0.9
    """Decay of the mean of gradients; not adafactor's, which keeps none."""
    beta2: float = 0.999
    """AdamW's decay of the mean of squared gradients; Lion's (whose authors take 0.99), of what it
    remembers of gradients."""
    max_grad_norm: float | None = 0.3
    """Gradients are clipped to this global norm."""
    sequence_length: int | None = None
    """Tokens of a row, to which examples are padded or packed; None: the longest example's, rounded
    up to a multiple of 16 as far as the limit they were tokenized with allows."""
    packing: bool = False
    """Put as many examples into a row as fit; they do not see each other."""
    group_by_length: bool = False
    """Put examples of like length into a batch, so that less of it is padding."""
    buckets: int | None = None
    """How many lengths of rows there are, 1 to 3: a batch is padded to the shortest that holds it,
    and each is compiled once. None: 3 with group_by_length, else 1."""
    remat: RematPolicy = "none"
    """What the backward pass keeps of each layer, the rest being computed again: all it needs, only
    what comes out of products (dots), of those only the narrow ones (names), only its input (full:
    least memory, a third more time), or the narrow ones in the host's memory (offload)."""
    attention: AttentionImplementation | None = None
    """Of decoders: xla, splash (TPU) or cudnn (NVIDIA GPUs, bf16 and fp16). None: the kernels of
    the device at hand where they take the model's attention, else xla."""
    memory: Literal["manual", "auto"] = "manual"
    """auto: choose `remat` and `paged` at the start, the fastest that fit the device by the formula
    of `qlora-jax plan`."""
    seed: int = 0
    """Of the adapters' initial values, the order of examples, and dropout."""
    eval_every: int | None = None
    """Steps between evaluations; there is always one at the end."""
    save_every: int | None = 250
    """Steps between checkpoints, output/step-N: the adapter, and all that resuming needs; there is
    always one at the end."""
    keep: int | None = 3
    """How many checkpoints are kept, the newest; None: all."""
    max_skipped: int = 5
    """A step whose loss or gradient is not finite is skipped; after so many in a row the run stops.
    """
    log_every: int = 1
    """Steps between lines of metrics.jsonl; there is always one of the last step."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise QloraError(
                f"give steps or epochs, not both (got {self.steps} steps, {self.epochs} epochs)"
            )
        counts = ("steps", "batch_size", "accumulate", "sequence_length")
        for name in (*counts, "eval_every", "save_every", "keep", "max_skipped", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise QloraError(f"{name} must be at least 1, got {value}")
        for name in ("epochs", "learning_rate", "loraplus_lr_ratio", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise QloraError(f"{name} must be positive, got {value}")
        if self.seed < 0:
            raise QloraError(f"seed must not be negative, got {self.seed}")
        if self.seed >= 2**63:  # jax.random.key takes no more
            raise QloraError(f"seed must be at most 2**63 - 1, got {self.seed}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise QloraError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise QloraError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.warmup < 0 or (isinstance(self.warmup, float) and not self.warmup <= 1):
            raise QloraError(
                "warmup must be a whole number of steps, or a share of them from 0.0 to 1.0, "
                f"got {self.warmup}"
            )
        check_remat(self.remat)
        with use_attention(self.attention):  # says what it does not know
            pass
        if self.memory not in ("manual", "auto"):
            raise QloraError(f"memory must be manual or auto, got {self.memory!r}")
        check_shapes(self.packing, self.group_by_length, self.most_buckets)
        if self.schedule not in get_args(ScheduleName):
            raise QloraError(f"schedule must be constant, linear or cosine, got {self.schedule!r}")
        if self.optimizer not in get_args(OptimizerName):
            raise QloraError(
                f"optimizer must be one of {', '.join(get_args(OptimizerName))}, "
                f"got {self.optimizer!r}"
            )

    @property
    def most_buckets(self) -> int:
        """`buckets`, its default resolved."""
        return (3 if self.group_by_length else 1) if self.buckets is None else self.buckets

    def steps_for(self, rows: float) -> int:
        """How many steps the run takes, if an epoch has so many rows."""
        if self.steps is not None:
            return self.steps
        epochs = 1.0 if self.epochs is None else self.epochs
        return max(1, round(epochs * rows / (self.batch_size * self.accumulate)))

    def learning_rates(self, steps: int) -> optax.Schedule:
        """Step -> learning rate, over a run of `steps`."""
        return schedule(self.schedule, self.learning_rate, steps, self.warmup)

    def make_optimizer(self, steps: int) -> optax.GradientTransformation:
        """The chosen optimizer on that schedule."""
        rates, decay = self.learning_rates(steps), self.weight_decay
        b1, b2 = self.beta1, self.beta2
        optimizer: optax.GradientTransformation
        if self.optimizer == "adamw":
            optimizer = optax.adamw(rates, b1, b2, weight_decay=decay)
        elif self.optimizer == "adamw8bit":
            optimizer = adamw8bit(rates, b1, b2, weight_decay=decay)
        elif self.optimizer == "lion":
            optimizer = optax.lion(rates, b1, b2, weight_decay=decay)
        else:
            # Not optax.adafactor: its steps are in proportion to the parameter, and B starts from
            # zero; its decay takes no notice of the learning rate.
            optimizer = optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(decay),
                optax.scale_by_learning_rate(rates),
            )
        if self.loraplus_lr_ratio != 1:
            optimizer = lora_plus(optimizer, self.loraplus_lr_ratio)
        return paged(optimizer) if self.paged else optimizer
