"""LoraConfig: ranks, scalings and what it refuses."""

import math
from typing import Any

import pytest

from qlora_jax.errors import QloraError
from qlora_jax.lora import LoraConfig, VeraConfig

Q = "layers.0.self_attn.q_proj"


def test_defaults() -> None:
    config = LoraConfig(rank=8, alpha=24.0)
    assert config.rank_of(Q) == 8
    assert config.scaling_of(Q) == 3.0


def test_rslora_divides_by_the_square_root_of_the_rank() -> None:
    config = LoraConfig(rank=9, alpha=6.0, rslora=True, rank_pattern={"k_proj": 16})
    assert config.scaling_of(Q) == 2.0
    assert config.scaling_of("self_attn.k_proj") == 1.5
    assert LoraConfig(rank=8, alpha=1.0, rslora=True).scaling_of(Q) == 1.0 / math.sqrt(8)


# PEFT: re.match(rf"(.*\.)?({pattern})$", name).
@pytest.mark.parametrize(
    ("pattern", "matches"),
    (
        ("q_proj", True),
        (Q, True),
        ("self_attn.q_proj", True),
        (r"layers\.\d+\.self_attn\.q_proj", True),
        (r".*\.q_proj", True),
        ("q_proj|v_proj", True),
        ("v_proj|q_proj", True),
        ("[qkv]_proj", True),
        ("proj", False),  # only what follows a dot
        ("q_pro", False),  # to the end
        ("self_attn", False),  # a module around it
        ("attn.q_proj", False),
        ("layers", False),
    ),
)
def test_pattern_matches_the_name_or_what_follows_a_dot(pattern: str, matches: bool) -> None:
    config = LoraConfig(rank=4, alpha=4.0, rank_pattern={pattern: 2}, alpha_pattern={pattern: 10.0})
    assert config.rank_of(Q) == (2 if matches else 4)
    assert config.scaling_of(Q) == (5.0 if matches else 1.0)


def test_first_matching_pattern_counts() -> None:
    patterns = {r"layers\.0\..*": 2, "q_proj": 3, ".*": 5}
    config = LoraConfig(rank=4, rank_pattern=patterns)
    assert config.rank_of(Q) == 2
    assert config.rank_of("layers.1.self_attn.q_proj") == 3
    assert config.rank_of("layers.1.mlp.up_proj") == 5


def test_rank_and_alpha_patterns_are_independent() -> None:
    """A pattern for one leaves the other at its default; a pattern's rank divides any alpha."""
    config = LoraConfig(
        rank=8, alpha=16.0, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 32.0}
    )
    assert config.scaling_of("a.q_proj") == 4.0
    assert config.scaling_of("a.v_proj") == 4.0
    assert config.scaling_of("a.k_proj") == 2.0


@pytest.mark.parametrize("rank", (0, -1))
def test_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(QloraError, match=f"rank = {rank}"):
        LoraConfig(rank=rank)
    with pytest.raises(QloraError, match=f"q_proj = {rank}"):
        LoraConfig(rank_pattern={"q_proj": rank})


def test_rank_that_is_no_integer_is_refused() -> None:
    with pytest.raises(QloraError, match=r"must be an integer, got rank = 2\.0"):
        LoraConfig(rank=2.0)  # type: ignore[arg-type]
    with pytest.raises(QloraError, match=r"must be an integer, got q_proj = 2\.0"):
        LoraConfig(rank_pattern={"q_proj": 2.0})  # type: ignore[dict-item]


@pytest.mark.parametrize("dropout", (-0.1, 1.0, 1.5))
def test_dropout_outside_its_range_is_refused(dropout: float) -> None:
    with pytest.raises(QloraError, match="dropout"):
        LoraConfig(dropout=dropout)


@pytest.mark.parametrize("alpha", (0.0, -1.0, math.inf, math.nan))
def test_alpha_that_scales_by_nothing_is_refused(alpha: float) -> None:
    with pytest.raises(QloraError, match=f"positive and finite, got alpha = {alpha}"):
        LoraConfig(alpha=alpha)
    with pytest.raises(QloraError, match=f"got q_proj = {alpha}"):
        LoraConfig(alpha_pattern={"q_proj": alpha})


@pytest.mark.parametrize("setting", ("targets", "rank_pattern", "alpha_pattern"))
def test_what_is_no_regular_expression_is_refused(setting: str) -> None:
    for bad in ("q_proj(", "*proj", "[qv_proj"):
        value = bad if setting == "targets" else {"v_proj": 1, bad: 2}
        with pytest.raises(QloraError) as caught:
            LoraConfig(**{setting: value})
        message = f"{setting}: {bad!r} is not a regular expression"
        assert message in str(caught.value)


def test_lists_become_tuples() -> None:
    """As JSON gives them; a tuple of names is not mistaken for a regular expression."""
    config = LoraConfig(targets=["q_proj"], modules_to_save=["lm_head"])  # type: ignore[arg-type]
    assert config.targets == ("q_proj",)
    assert config.modules_to_save == ("lm_head",)


@pytest.mark.parametrize("config", (LoraConfig, VeraConfig))
def test_one_module_to_save_need_not_be_in_a_list(config: Any) -> None:
    assert config(modules_to_save="lm_head").modules_to_save == ("lm_head",)


@pytest.mark.parametrize("init", ("default", "gaussian", "pissa", "pissa_niter_16", "loftq"))
def test_initial_values_by_name(init: str) -> None:
    assert LoraConfig(init=init).changes_base == (init not in ("default", "gaussian"))


@pytest.mark.parametrize("init", ("olora", "pissa_niter_0", "pissa_niter_", "Pissa", ""))
def test_other_initial_values_are_refused(init: str) -> None:
    with pytest.raises(QloraError, match=f"init must be default, .* got {init!r}"):
        LoraConfig(init=init)


def test_rounds_of_loftq_below_one_are_refused() -> None:
    with pytest.raises(QloraError, match="loftq_iter must be at least 1, got 0"):
        LoraConfig(loftq_iter=0)
