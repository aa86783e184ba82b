"""Keeps a page's arithmetic the same to the bit as that of all parameters at once.

XLA turns x / s into x * (1 / s), which rounds differently, where a number s has no other use.
AdamW's bias corrections divide the moments of every parameter, but in the loop over one parameter's
pages they would divide its alone.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from qlora_jax.training.dependence import Dependence, dependences


def with_divisors(
    function: Callable[..., Any], args: tuple[Any, ...], own: Any
) -> tuple[Any, list[jax.Array]]:
    """`function(*args)`, and the numbers by which it divides arrays but which come from no `own`
    argument: handed on to something that XLA does not see through, they have another use.

    own: whether it is of some parameter, for each leaf of `args` or part of them.
    """
    # Functions jitted for themselves, such as optax's bias correction, are traced as they stand.
    with jax.disable_jit():
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    found = dict.fromkeys(eqn.invars[1] for eqn in jaxpr.eqns if _divides_an_array(eqn))
    owned = [
        Dependence(frozenset({0} if mine else ()))
        for mine in jax.tree.leaves(jax.tree.broadcast(own, args))
    ]
    origins = dependences(jaxpr.replace(outvars=list(found)), owned)
    shared = [var for var, origin in zip(found, origins, strict=True) if not origin.sources]
    wider = core.ClosedJaxpr(jaxpr.replace(outvars=[*jaxpr.outvars, *shared]), closed.consts)
    out = core.jaxpr_as_fun(wider)(*jax.tree.leaves(args))
    count = len(jaxpr.outvars)
    return jax.tree.unflatten(jax.tree.structure(shape), out[:count]), out[count:]


def _divides_an_array(eqn: Any) -> bool:
    if eqn.primitive.name != "div":
        return False
    divisor = eqn.invars[1]
    number = not isinstance(divisor, core.Literal) and not divisor.aval.shape
    return number and bool(eqn.outvars[0].aval.shape)
