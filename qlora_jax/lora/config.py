"""What a person chooses about low-rank adapters."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import TypeVar

from qlora_jax.errors import QloraError

Value = TypeVar("Value", int, float)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685): W x becomes W x + scaling * B A x.

    Raises QloraError for a rank below 1 and a dropout outside [0, 1).
    """

    rank: int = 16
    """R, the inner size of every adapter."""
    alpha: float = 32.0
    """The adapter's product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability of dropping each input of A while training."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    targets: str | tuple[str, ...] = "all-linear"
    """What gets an adapter: all-linear (every linear kernel but the output head), names of modules
    or ends of them (q_proj v_proj), or one regular expression for them."""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Name or regular expression -> rank, where it differs; the first that matches counts."""
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Likewise for alpha."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full, by their names or ends of them."""

    def __post_init__(self) -> None:
        for where, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise QloraError(f"the rank of an adapter must be at least 1, got {where} = {rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise QloraError(f"dropout must be in [0, 1), got {self.dropout}")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor on B A x for a module, by its dotted name."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """PEFT's rule: a pattern matches the whole name or what follows a dot in it."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
