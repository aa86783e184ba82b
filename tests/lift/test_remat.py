"""jax.checkpoint inside a lifted function: its policy decides what is kept, as in the plain one."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals

from qlora_jax import lora
from qlora_jax.lift import lift
from tests.lift.oracle import BASES, check, compare, densify, equations, kernel, normal, prepare

PARAMS = {"up": kernel(0, 64, 96), "down": kernel(1, 96, 64)}
AXES = {"up": (1, 1), "down": (1, 1)}
X = normal(2, 5, 64)
ONLY_HIDDEN = jax.checkpoint_policies.save_only_these_names("hidden")

POLICIES = {
    "nothing": None,
    "names": ONLY_HIDDEN,
    "everything": jax.checkpoint_policies.everything_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["hidden"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematted(policy: Any, prevent_cse: bool = True) -> Any:
    def inner(p: Any, x: jax.Array) -> jax.Array:
        hidden = checkpoint_name(x @ p["up"], "hidden")
        return jnp.sin(jnp.tanh(hidden) @ p["down"])

    return lambda p, x: jnp.cos(jax.checkpoint(inner, policy=policy, prevent_cse=prevent_cse)(p, x))


@pytest.mark.parametrize("policy", POLICIES)
def test_values_and_gradients(policy: str) -> None:
    check(rematted(POLICIES[policy]), PARAMS, AXES, X, bases=BASES)


@pytest.mark.parametrize("base", ("nf4", "dense"))
def test_the_remat_equation_is_kept(base: str) -> None:
    frozen, adapters = prepare(PARAMS, AXES, base)
    fn = lift(rematted(ONLY_HIDDEN, prevent_cse=False), strict=True)
    jaxpr = jax.make_jaxpr(lambda a, x: fn(lora.attach(frozen, a), x))(adapters, X)
    found = [eqn for eqn in equations(jaxpr) if "policy" in eqn.params]
    assert [eqn.params["policy"] for eqn in found] == [ONLY_HIDDEN]
    assert found[0].params["prevent_cse"] is False


def kept(capsys: Any, f: Any, *args: Any) -> list[str]:
    """Types of what is kept for the backward pass, arguments and constants apart."""
    print_saved_residuals(f, *args)
    lines = capsys.readouterr().out.splitlines()
    made = [line for line in lines if "from the argument" not in line and "a constant" not in line]
    return sorted(line.split()[0] for line in made)


@pytest.mark.parametrize("base", ("nf4", "dense"))
def test_named_value_is_all_that_is_kept(base: str, capsys: Any) -> None:
    """Besides the arguments: the named hidden state, and cos' argument outside the checkpoint."""
    frozen, adapters = prepare(PARAMS, AXES, base)
    fn = lift(rematted(ONLY_HIDDEN), strict=True)
    residuals = kept(capsys, lambda a, x: jnp.sum(fn(lora.attach(frozen, a), x)), adapters, X)
    floats = [r for r in residuals if r.startswith("f32")]
    assert floats.count("f32[5,96]") == 1, residuals
    dense = {"f32[64,96]", "f32[96,64]"}
    if base == "nf4":
        assert not dense & set(residuals), f"a decoded weight is kept: {residuals}"
    without_checkpoint = lift(
        lambda p, x: jnp.cos(jnp.sin(jnp.tanh(x @ p["up"]) @ p["down"])), strict=True
    )
    more = kept(
        capsys, lambda a, x: jnp.sum(without_checkpoint(lora.attach(frozen, a), x)), adapters, X
    )
    assert len([r for r in more if r.startswith("f32[5")]) > len(
        [r for r in floats if r.startswith("f32[5")]
    )


def test_nothing_is_kept_of_a_full_remat(capsys: Any) -> None:
    frozen, adapters = prepare(PARAMS, AXES, "nf4")
    fn = lift(jax.checkpoint(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]), strict=True)
    residuals = kept(capsys, lambda a, x: jnp.sum(fn(lora.attach(frozen, a), x)), adapters, X)
    assert not [r for r in residuals if r.startswith("f32[5")], residuals


def test_weight_closed_over_and_nested_remat() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        inner = jax.checkpoint(lambda x: jnp.tanh(x @ p["up"]))
        return jax.checkpoint(lambda x: inner(x) @ p["down"])(x)

    check(fn, PARAMS, AXES, X, bases=("nf4", "dense"))


def test_weight_leaves_a_remat() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        y, w = jax.checkpoint(lambda p, x: (jnp.tanh(x @ p["up"]), p["down"]))(p, x)
        return y @ w

    check(fn, PARAMS, AXES, X, bases=("nf4", "dense"))


def test_checkpoint_around_a_lifted_function() -> None:
    frozen, adapters = prepare(PARAMS, AXES, "nf4")

    def plain(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["up"]) @ p["down"]

    lifted = jax.checkpoint(lift(plain, strict=True))
    compare(
        lambda a, x: lifted(lora.attach(frozen, a), x),
        lambda a, x: plain(densify(frozen, a), x),
        adapters,
        X,
    )
