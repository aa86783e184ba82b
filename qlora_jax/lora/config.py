"""What a person chooses about low-rank adapters."""

import dataclasses
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from qlora_jax.errors import QloraError

Value = TypeVar("Value", int, float)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685): W x becomes W x + scaling * B A x.

    Raises QloraError for a rank that is no integer of at least 1, an alpha that is not positive, a
    dropout outside [0, 1), an `init` that there is not, and what is no regular expression where one
    may stand.
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
    """What gets an adapter: all-linear (every linear kernel, those of experts too, but the output
    head and routers), names of modules or ends of them (q_proj v_proj), or one regular expression
    for them."""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Name or regular expression -> rank, where it differs; the first that matches counts. Layers
    are stacked, so names have no layer number: layers.self_attn.q_proj, or its end."""
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Likewise for alpha."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full, by their names or ends of them."""
    dora: bool = False
    """Train the length of each output's weights too, and of A B only the direction that they take
    (arXiv:2402.09353)."""
    init: str = "default"
    """What A and B start from: default (A kaiming-uniform, B zero); gaussian (A normal with the
    deviation 1 / rank); pissa, the largest singular values of the weight, which are taken out of it
    (arXiv:2404.02948), or pissa_niter_4, the same by 4 iterations; loftq, what quantization loses
    (arXiv:2310.08659)."""
    loftq_iter: int = 1
    """How often loftq quantizes what its last A B leaves of the weight."""

    def __post_init__(self) -> None:
        for where, rank in {"rank": self.rank, **self.rank_pattern}.items():
            check_rank(where, rank)
        for where, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not 0 < alpha < math.inf:
                raise QloraError(f"alpha must be positive and finite, got {where} = {alpha}")
        check_dropout(self.dropout)
        if not re.fullmatch(r"default|gaussian|pissa(_niter_[1-9]\d*)?|loftq", self.init):
            raise QloraError(
                f"init must be default, gaussian, pissa, pissa_niter_N or loftq, got {self.init!r}"
            )
        if self.loftq_iter < 1:
            raise QloraError(f"loftq_iter must be at least 1, got {self.loftq_iter}")
        check_modules(self)
        check_expressions("rank_pattern", self.rank_pattern)
        check_expressions("alpha_pattern", self.alpha_pattern)

    @property
    def changes_base(self) -> bool:
        """Whether the initial values are taken out of the base weight, which must be dense then."""
        return self.init == "loftq" or self.init.startswith("pissa")

    def rank_of(self, module: str) -> int:
        """R of a module, by its dotted name."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor on B A x for a module, by its dotted name."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def check_rank(where: str, rank: Any) -> None:
    """Raises QloraError for a rank that no matrix can have; where: the name of the setting."""
    if not isinstance(rank, numbers.Integral):
        raise QloraError(f"the rank of an adapter must be an integer, got {where} = {rank!r}")
    if rank < 1:
        raise QloraError(f"the rank of an adapter must be at least 1, got {where} = {rank}")


def check_dropout(dropout: Any) -> None:
    """Raises QloraError for a probability of dropping that is not in [0, 1)."""
    if not 0.0 <= dropout < 1.0:
        raise QloraError(f"dropout must be in [0, 1), got {dropout}")


def check_modules(config: Any) -> None:
    """Lists of modules in `config` become tuples, one to save too. Raises QloraError for a bad
    pattern."""
    if not isinstance(config.targets, str):
        object.__setattr__(config, "targets", tuple(config.targets))
    full = config.modules_to_save
    full = (full,) if isinstance(full, str) else tuple(full)
    object.__setattr__(config, "modules_to_save", full)
    check_expressions("targets", [config.targets] if isinstance(config.targets, str) else [])


def check_expressions(setting: str, patterns: Iterable[str]) -> None:
    """Raises QloraError for a pattern that is no regular expression."""
    for pattern in patterns:
        try:
            matches(pattern, "")
        except re.error as error:
            raise QloraError(
                f"{setting}: {pattern!r} is not a regular expression: {error}"
            ) from error


def matches(pattern: str, module: str) -> bool:
    """PEFT's rule: a pattern matches the whole dotted name or what follows a dot in it."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


def _by_pattern(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    return next((v for pattern, v in patterns.items() if matches(pattern, module)), default)
