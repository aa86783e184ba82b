"""What each output of a function depends on: which inputs, and whether row by row.

Read from the function's jaxpr. What is not known to be harmless counts as mixing everything, so
that the answer errs on one side only.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

from jax.extend import core


class Rows(enum.IntEnum):
    """How an array varies along its axis 0, from the tamest to the wildest."""

    SAME = 0
    """Not at all; or there is no axis."""
    OWN = 1
    """Row i comes from rows i of the inputs."""
    MIXED = 2
    """Rows come from several rows, or from their numbers."""


@dataclasses.dataclass(frozen=True)
class Dependence:
    """Of an array: on which inputs (by their labels), and how along axis 0."""

    sources: frozenset[int] = frozenset()
    rows: Rows = Rows.MIXED


def dependences(jaxpr: core.Jaxpr, inputs: Sequence[Dependence]) -> list[Dependence]:
    """Of each output of `jaxpr`, given those of its inputs; constants depend on nothing."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {var: _constant(var) for var in jaxpr.constvars}

    def read(atom: Any) -> Dependence:
        return _constant(atom) if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        inner = _called(eqn)
        if inner is not None and len(inner.invars) == len(given):
            found = dependences(inner, given)
        else:
            sources = frozenset().union(*(d.sources for d in given))
            rows = _rows(eqn, given)
            found = [
                # A number that comes from no input is the same for all rows, however it is made.
                Dependence(sources, Rows.SAME if not sources and _is_number(var) else rows)
                for var in eqn.outvars
            ]
        known |= dict(zip(eqn.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def draws_numbers(jaxpr: core.Jaxpr) -> bool:
    """Whether a function makes random numbers, itself or in what it calls."""
    return any(eqn.primitive.name.startswith(_RANDOM) for eqn in jaxpr.eqns) or any(
        draws_numbers(inner) for inner in core.subjaxprs(jaxpr)
    )


_RANDOM = ("random_bits", "random_split", "random_fold_in", "threefry", "rng_")


def _is_number(atom: Any) -> bool:
    return not atom.aval.shape


def _constant(atom: Any) -> Dependence:
    return Dependence(rows=Rows.SAME if _is_number(atom) else Rows.MIXED)


CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")


def _called(eqn: Any) -> core.Jaxpr | None:
    """The function that an equation just calls."""
    if eqn.primitive.name not in CALLS:
        return None
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner


_ELEMENTWISE = """
abs add add_any and atan2 bitcast_convert_type cbrt ceil clamp clz convert_element_type copy cos div
eq erf exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg
nextafter not or population_count pow real imag reduce_precision rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sqrt square stop_gradient sub tanh xor
"""
_REDUCTIONS = "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum"
ELEMENTWISE, REDUCTIONS = frozenset(_ELEMENTWISE.split()), frozenset(_REDUCTIONS.split())


def _rows(eqn: Any, given: Sequence[Dependence]) -> Rows:
    """Of an equation's outputs along axis 0."""
    name, params = eqn.primitive.name, eqn.params
    worst = max((d.rows for d in given), default=Rows.MIXED)
    shapes = [atom.aval.shape for atom in eqn.invars]
    shape = eqn.outvars[0].aval.shape
    if name == "iota":
        return Rows.MIXED if params["dimension"] == 0 else Rows.SAME
    if name == "broadcast_in_dim":
        placed = params["broadcast_dimensions"]
        if 0 not in placed:  # axis 0 is new
            return Rows.MIXED if worst is Rows.OWN or given[0].sources else Rows.SAME
        return worst if placed[0] == 0 and shapes[0][0] == shape[0] else Rows.MIXED
    keeps = {
        "reshape": lambda: shapes[0][:1] == shape[:1] and len(shape) > 0,
        "squeeze": lambda: 0 not in params["dimensions"],
        "transpose": lambda: params["permutation"][0] == 0,
        "concatenate": lambda: params["dimension"] != 0,
        "pad": lambda: params["padding_config"][0] == (0, 0, 0),
        "slice": lambda: shapes[0][0] == shape[0],
    }
    fine = name in ELEMENTWISE
    fine |= name in REDUCTIONS and 0 not in params["axes"]
    fine |= name in keeps and keeps[name]()
    return worst if fine else Rows.MIXED
