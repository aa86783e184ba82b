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

    rank            R, the inner size of every adapter
    alpha           scaling = alpha / rank, or alpha / sqrt(rank) with `rslora` (arXiv:2312.03732)
    dropout         probability of dropping each input of A while training
    targets         which modules get an adapter: "all-linear" (every linear kernel but the output
                    head), a tuple of names matched as suffixes ("q_proj"), or one regular
                    expression for the whole name ("layers.self_attn.q_proj")
    rank_pattern    name or regular expression -> rank, where it differs; first match counts
    alpha_pattern   likewise for alpha
    modules_to_save modules whose parameters are trained in full, by suffix of their names
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()

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
