"""Learning rates and settings."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from qlora_jax.errors import QloraError
from qlora_jax.training.schedules import schedule
from qlora_jax.training.settings import TrainSettings


def rates(fn: optax.Schedule, steps: int) -> np.ndarray:
    return np.asarray([float(fn(step)) for step in range(steps)])


def test_constant() -> None:
    np.testing.assert_allclose(rates(schedule("constant", 2.0, 5, 0), 5), 2.0)


def test_linear_reaches_zero_after_the_last_step() -> None:
    fn = schedule("linear", 1.0, 4, 0)
    np.testing.assert_allclose(rates(fn, 5), [1, 0.75, 0.5, 0.25, 0])


def test_cosine() -> None:
    want = 0.5 * (1 + np.cos(np.pi * np.arange(9) / 8))
    np.testing.assert_allclose(rates(schedule("cosine", 1.0, 8, 0), 9), want, atol=1e-7)


@pytest.mark.parametrize("warmup", (4, 0.2))
@pytest.mark.parametrize("name", ("constant", "linear", "cosine"))
def test_warmup_in_steps_or_as_a_share(name: Any, warmup: int | float) -> None:
    got = rates(schedule(name, 1.0, 20, warmup), 20)
    np.testing.assert_allclose(got[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(got[4:], rates(schedule(name, 1.0, 16, 0), 16), rtol=1e-6)


@pytest.mark.parametrize("warmup", (1, 3, 1.0))
def test_short_runs(warmup: int | float) -> None:
    got = rates(schedule("linear", 1.0, 3, warmup), 3)
    assert np.isfinite(got).all() and got.max() == 1.0 and got[0] > 0


def test_one_step_is_one_and_not_all_of_them() -> None:
    assert rates(schedule("constant", 1.0, 10, 1), 10).min() == 1.0
    assert rates(schedule("constant", 1.0, 10, 1.0), 10)[0] == pytest.approx(0.1)


def test_under_jit() -> None:
    fn = schedule("cosine", 1.0, 10, 3)
    np.testing.assert_allclose(jax.jit(fn)(7), fn(7), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "warmup", "message"),
    (
        ("constant", 11, "warm-up of 11 steps does not fit a run of 10"),
        ("constant", -1, "warm-up of -1"),
        ("sine", 0, "must be constant, linear or cosine, got 'sine'"),
    ),
)
def test_bad_schedules(name: Any, warmup: int, message: str) -> None:
    with pytest.raises(QloraError, match=message):
        schedule(name, 1.0, 10, warmup)


@pytest.mark.parametrize(
    ("setting", "message"),
    (
        ({"steps": 3, "epochs": 1.0}, "steps or epochs, not both"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"accumulate": 0}, "accumulate"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"eval_every": 0}, "eval_every"),
        ({"save_every": -1}, "save_every"),
        ({"log_every": 0}, "log_every"),
        ({"epochs": 0.0}, "epochs must be positive"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\)"),
        ({"beta2": -0.1}, "beta2"),
        ({"warmup": 1.5}, "warmup must be a whole number of steps, or a share"),
        ({"warmup": -1}, "warmup"),
        ({"schedule": "sine"}, "schedule must be constant, linear or cosine"),
    ),
)
def test_bad_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(QloraError, match=message):
        TrainSettings(**setting)


@pytest.mark.parametrize(
    ("setting", "steps"),
    (
        ({}, 25),
        ({"epochs": 2.0}, 50),
        ({"epochs": 0.5, "batch_size": 5, "accumulate": 2}, 5),
        ({"epochs": 0.001}, 1),
        ({"steps": 7}, 7),
    ),
)
def test_steps_of_a_run_over_100_examples(setting: dict[str, Any], steps: int) -> None:
    assert TrainSettings(**setting).steps_for(100) == steps


def test_every_setting_is_explained() -> None:
    """The text below a field is its help on the command line."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(TrainSettings)).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = [i for i, node in enumerate(body.body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 15
    for i in fields:
        below = body.body[i + 1]
        assert isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
