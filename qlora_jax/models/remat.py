"""What the backward pass has of a layer: kept from the forward pass, or computed again."""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.errors import QloraError

RematPolicy = Literal["none", "full", "dots", "names", "offload"]
"""What is kept of each layer for the backward pass, most memory first; D, F as in `decoder`.

none     all that its products and attention need: about 6 D + 2 F a token
dots     what comes out of products, named as `named` says; norms, gates and attention are computed
         again
names    the same without the MLP's [B, T, F] arrays, by far the largest; their products are
         computed again
full     the layer's input alone; the whole layer is computed again
offload  as `names`, but in the host's memory: nothing stays on the device
"""

Remat = RematPolicy | bool
"""A policy by its name; True is "full", False "none"."""

Name = Literal["layer_input", "query", "key", "value", "attended", "wide"]
"""The layer's input, attention's three inputs, the residual stream after attention (before the norm
where that follows it), and what the MLP's first products give. The last product's output is part of
the next layer's input."""

_NARROW: tuple[Name, ...] = ("layer_input", "query", "key", "value", "attended")
_WIDE: tuple[Name, ...] = ("wide",)

cheap = functools.partial(jax.checkpoint, prevent_cse=False)
"""Marks where the backward pass starts from the inputs again, under every policy. What lies between
two such places is a norm or a gate before matrix products; of those no output is needed again but
what the next place keeps, so they are not repeated: of all [B, T, F] arrays of a Llama gate and up
alone are kept."""


def named(name: Name, x: Any) -> Any:
    """x, known to the policies by that name; may be a tree. Models name what their products give:
    the products themselves may be anything (see `qlora_jax.lift`), also what JAX's policies for
    dots cannot see."""
    return checkpoint_name(x, name)


def check_remat(remat: Any) -> None:
    """Raises QloraError for what is no policy."""
    if not isinstance(remat, bool) and remat not in get_args(RematPolicy):
        raise QloraError(f"remat must be one of {', '.join(get_args(RematPolicy))}, got {remat!r}")


def rematerialized(step: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A layer's step, the body of a scan over layers, under a policy.

    Raises QloraError for a name that is none.
    """
    check_remat(remat)
    policies = jax.checkpoint_policies
    match remat:
        case "none" | False:
            return step
        case "full" | True:
            policy = None
        case "dots":
            policy = policies.save_only_these_names(*_NARROW, *_WIDE)
        case "names":
            policy = policies.save_only_these_names(*_NARROW)
        case "offload":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=_NARROW,
                offload_src="device",
                offload_dst="pinned_host",
            )
    # The layers run inside a scan, whose forward and backward loops are separate: XLA cannot undo
    # the recomputation.
    return jax.checkpoint(step, policy=policy, prevent_cse=False)
