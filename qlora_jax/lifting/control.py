"""Weights through calls, loops, branches and custom derivatives."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.interpreters import ad

from qlora_jax.lifting.lazy import Lazy
from qlora_jax.lifting.view import View
from qlora_jax.lora.array import (
    AdaptedArray,
    apart,
    cotangent,
    map_stacked,
    together,
    trained_part,
)


class Walker(Protocol):
    """What the rules ask of the walk that they are part of."""

    def walk(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The outputs of a jaxpr, in which weights may still be lazy."""
        ...

    def dense(self, x: Any, primitive: str) -> Any:
        """x, made dense if it is lazy: logged, or an error if that is forbidden."""
        ...


def call(eqn: JaxprEqn, inputs: list[Any], walker: Walker) -> list[Any]:
    """jit and other plain calls: walked in place."""
    closed: ClosedJaxpr = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
    return walker.walk(closed.jaxpr, closed.consts, inputs)


def remat(eqn: JaxprEqn, inputs: list[Any], walker: Walker) -> list[Any]:
    """jax.checkpoint, with its policy."""
    leaving = _Leaving()

    def body(inputs: list[Any]) -> list[Any]:
        outputs = walker.walk(eqn.params["jaxpr"], (), inputs)
        return leaving.pack(outputs, inputs, walker, "checkpoint")

    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return leaving.unpack(jax.checkpoint(body, **options)(inputs), inputs)


def scan(eqn: JaxprEqn, inputs: list[Any], walker: Walker) -> list[Any]:
    """lax.scan with weights as constants, as unchanged carries and as xs; they may leave as ys."""
    params, closed = eqn.params, eqn.params["jaxpr"]
    num_consts, num_carry = _scan_counts(params)
    consts, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
    xs = [_leading(x, walker) for x in inputs[num_consts + num_carry :]]
    scanned, common = zip(*(_scanned(x) for x in xs), strict=True) if xs else ((), ())
    leaving = _Leaving()

    def attempt(fixed: "_FixedCarry") -> list[Any]:
        def step(moving: list[Any], leaves: list[Any]) -> tuple[list[Any], list[Any]]:
            slices = [
                Lazy(together(leaf, shared), x.view.drop(0), x.dtype, x.path)
                if isinstance(x, Lazy)
                else leaf
                for x, (leaf, shared) in zip(xs, zip(leaves, common, strict=True), strict=True)
            ]
            outputs = walker.walk(
                closed.jaxpr, closed.consts, [*consts, *fixed.join(moving), *slices]
            )
            ys = leaving.pack(outputs[num_carry:], slices, walker, "scan")
            return fixed.split(outputs[:num_carry], walker, "scan"), ys

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        moving, ys = jax.lax.scan(step, fixed.moving, list(scanned), **options)
        return [*fixed.join(moving), *leaving.unpack(ys, xs, scanned=True)]

    return _with_fixed_carry(carry, attempt, walker, "scan")


def while_loop(eqn: JaxprEqn, inputs: list[Any], walker: Walker) -> list[Any]:
    """lax.while_loop with weights as constants and as unchanged carries."""
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    n_test, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test_consts, body_consts = inputs[:n_test], inputs[n_test : n_test + n_body]

    def attempt(fixed: "_FixedCarry") -> list[Any]:
        def go_on(moving: list[Any]) -> Any:
            return walker.walk(test.jaxpr, test.consts, [*test_consts, *fixed.join(moving)])[0]

        def step(moving: list[Any]) -> list[Any]:
            outputs = walker.walk(body.jaxpr, body.consts, [*body_consts, *fixed.join(moving)])
            return fixed.split(outputs, walker, "while")

        return fixed.join(jax.lax.while_loop(go_on, step, fixed.moving))

    return _with_fixed_carry(inputs[n_test + n_body :], attempt, walker, "while")


def cond(eqn: JaxprEqn, inputs: list[Any], walker: Walker) -> list[Any]:
    """lax.cond and lax.switch; a weight that every branch hands on is handed on around them."""
    index, *operands = inputs
    branches: Sequence[ClosedJaxpr] = eqn.params["branches"]
    handed_on = {}
    for place in range(len(eqn.outvars)):
        sources = {_source(branch.jaxpr, place) for branch in branches}
        source = sources.pop() if len(sources) == 1 else None
        if source is not None and isinstance(operands[source], Lazy):
            handed_on[place] = operands[source]

    def run(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
        def branch(*operands: Any) -> list[Any]:
            outputs = walker.walk(closed.jaxpr, closed.consts, operands)
            return [
                None if place in handed_on else walker.dense(out, "cond")
                for place, out in enumerate(outputs)
            ]

        return branch

    outputs = jax.lax.switch(index, [run(branch) for branch in branches], *operands)
    return [handed_on.get(place, out) for place, out in enumerate(outputs)]


def optimization_barrier(eqn: JaxprEqn, inputs: list[Any], walker: Walker) -> list[Any]:
    """lax.optimization_barrier: of a weight's leaves."""
    return jax.lax.optimization_barrier(inputs)


def custom_jvp(eqn: JaxprEqn, inputs: list[Any], walker: Walker) -> list[Any]:
    """A function with a derivative of its own, to which weights are passed.

    It becomes one with a gradient of its own, that of its derivative (forward-mode differentiation
    could not pass a 4-bit product in any case). Both programs are walked like any other; tangents
    are dense, and what the derivative says of a weight is projected as in `custom_vjp`.
    """
    _, jvp = eqn.primitive.get_bind_params(eqn.params)["subfuns"]
    closed: ClosedJaxpr = eqn.params["call_jaxpr"]
    types = [atom.aval for atom in eqn.invars]
    # What can have a tangent: of constants, integers and frozen weights it is zero.
    moving = [
        i
        for i, (x, aval) in enumerate(zip(inputs, types, strict=True))
        if i >= eqn.params["num_consts"]
        and _is_inexact(aval)
        and not (isinstance(x, Lazy) and not isinstance(x.array, AdaptedArray))
    ]
    outs = [i for i, var in enumerate(eqn.outvars) if _is_inexact(var.aval)]

    def dense(outputs: Sequence[Any]) -> list[Any]:
        return [walker.dense(out, "custom_jvp_call") for out in outputs]

    def derivative(*args: Any) -> tuple[list[Any], list[Any]]:
        """(primals, tangents of `moving`) -> (outputs, tangents of `outs`)."""
        symbolic = eqn.params["symbolic_zeros"]
        tangents = [
            SymbolicZero(aval.to_tangent_aval()) if symbolic else _zeros(aval) for aval in types
        ]
        for i, tangent in zip(moving, args[len(types) :], strict=True):
            tangents[i] = tangent
        results = jvp.call_wrapped(*args[: len(types)], *tangents)
        half = len(results) // 2
        moved = [results[half + i] for i in outs]
        return results[:half], [_zeros(t.aval) if isinstance(t, SymbolicZero) else t for t in moved]

    @jax.custom_vjp
    def run(inputs: list[Any]) -> list[Any]:
        return dense(walker.walk(closed.jaxpr, closed.consts, inputs))

    def forward(inputs: list[Any]) -> tuple[list[Any], Any]:
        program = jax.make_jaxpr(derivative)(*types, *(types[i] for i in moving))

        def linear(tangents: list[Any]) -> tuple[list[Any], list[Any]]:
            results = dense(walker.walk(program.jaxpr, program.consts, [*inputs, *tangents]))
            return results[len(eqn.outvars) :], results[: len(eqn.outvars)]

        _, pull, outputs = jax.vjp(linear, [_zeros(types[i]) for i in moving], has_aux=True)
        return outputs, (pull, [x if isinstance(x, Lazy) else None for x in inputs])

    def backward(kept: Any, cotangents: list[Any]) -> tuple[list[Any]]:
        pull, weights = kept
        (moved,) = pull([cotangents[i] for i in outs])
        gradients: list[Any] = [None] * len(types)
        for i, gradient in zip(moving, moved, strict=True):
            gradients[i] = gradient
        return ([_project(w, g) for w, g in zip(weights, gradients, strict=True)],)

    run.defvjp(forward, backward)
    return run(list(inputs))


def _is_inexact(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _zeros(aval: Any) -> Any:
    """A zero tangent as JAX makes them: it varies over the mesh as `aval` does."""
    return ad.instantiate_zeros(ad.Zero(aval.to_tangent_aval()))


def custom_vjp(eqn: JaxprEqn, inputs: list[Any], walker: Walker) -> list[Any]:
    """A function with a gradient of its own, to which weights are passed.

    Its forward and backward programs are walked like any other, and weights among the residuals
    stay lazy. The cotangent that it computes for a weight W is projected on what is trained.
    """
    _, _, bwd = eqn.primitive.get_bind_params(eqn.params)["subfuns"]
    closed: ClosedJaxpr = eqn.params["call_jaxpr"]
    num_consts = eqn.params["num_consts"]

    def dense(outputs: Sequence[Any]) -> list[Any]:
        return [walker.dense(out, "custom_vjp_call") for out in outputs]

    @jax.custom_vjp
    def run(inputs: list[Any]) -> list[Any]:
        return dense(walker.walk(closed.jaxpr, closed.consts, inputs))

    def forward(inputs: list[Any]) -> tuple[list[Any], Any]:
        args = inputs[num_consts:]
        perturbed = [True] * len(args)
        jaxpr, consts = eqn.params["fwd_jaxpr_thunk"].call_wrapped(*perturbed)
        outputs = walker.walk(jaxpr, consts, args)
        _, tree, forwarded = eqn.params["out_trees"]()
        made = tree.num_leaves - sum(source is not None for source in forwarded)
        computed = iter(outputs[:made])
        residuals = [next(computed) if i is None else inputs[i] for i in forwarded]
        weights = [x if isinstance(x, Lazy) else None for x in inputs]
        return dense(outputs[made:]), (residuals, weights)

    def backward(kept: Any, cotangents: list[Any]) -> tuple[list[Any]]:
        residuals, weights = kept
        args = [*residuals, *cotangents]
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
        # None stands for a zero cotangent: such have no array.
        jaxpr, tree = jax.make_jaxpr(
            lambda *args: [None if _is_zero(g) else g for g in _cotangents(bwd, args)],
            return_shape=True,
        )(*shapes)
        arrived = iter(walker.walk(jaxpr.jaxpr, jaxpr.consts, args))
        gradients = [None if shape is None else next(arrived) for shape in tree]
        pairs = zip(weights, gradients, strict=True)
        return ([_project(w, walker.dense(g, "custom_vjp_call")) for w, g in pairs],)

    run.defvjp(forward, backward)
    return run(list(inputs))


def _cotangents(bwd: Any, args: Sequence[Any]) -> Sequence[Any]:
    """What a backward function returns for its inputs; from JAX 0.12 on, logs come beside it."""
    match bwd.call_wrapped(*args):
        case [list() | tuple() as cotangents, _]:
            return cotangents
        case cotangents:
            return cotangents


def _is_zero(cotangent: Any) -> bool:
    return isinstance(cotangent, ad.Zero) or cotangent.dtype == jax.dtypes.float0


def _project(w: Lazy | None, gradient: Any) -> Any:
    """The cotangent of a lazy input, from that of the dense array for which it stands."""
    if w is None or gradient is None:
        return gradient
    trained = trained_part(w.array)
    if not trained:
        return None  # a frozen weight has none

    def dense(trained: dict[str, Any]) -> jax.Array:
        return dataclasses.replace(w, array=dataclasses.replace(w.array, **trained)).dense()

    _, pull = jax.vjp(dense, trained)
    (pulled,) = pull(gradient.astype(w.dtype))
    return dataclasses.replace(w, array=cotangent(w.array, pulled))


class _Leaving:
    """Weights that leave a traced body as they came in: they go around it, not out of it."""

    def __init__(self) -> None:
        self._sources: dict[int, tuple[int, Lazy]] = {}

    def pack(
        self, outputs: Sequence[Any], entered: Sequence[Any], walker: Walker, primitive: str
    ) -> list[Any]:
        """Inside: the body's outputs, None in place of what goes around."""
        self._sources = {}
        packed = []
        for place, out in enumerate(outputs):
            if isinstance(out, Lazy):
                source = next(
                    (
                        i
                        for i, w in enumerate(entered)
                        if isinstance(w, Lazy) and w.array is out.array
                    ),
                    None,
                )
                if source is not None:
                    self._sources[place] = (source, out)
                    packed.append(None)
                    continue
            packed.append(walker.dense(out, primitive))
        return packed

    def unpack(
        self, outputs: Sequence[Any], inputs: Sequence[Any], *, scanned: bool = False
    ) -> list[Any]:
        """Outside: the outputs with those weights in place, seen as the body saw them last."""
        result = list(outputs)
        for place, (source, inner) in self._sources.items():
            w = inputs[source]
            lead = w.view.dims[:1] if scanned else ()
            result[place] = Lazy(w.array, View((*lead, *inner.view.dims)), inner.dtype, w.path)
        return result


class _Changed(Exception):
    """A weight in a loop's carry did not come out as it went in."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


class _FixedCarry:
    """A loop's carry, with its weights taken out of it: they are the same at every turn."""

    def __init__(self, carry: Sequence[Any]) -> None:
        self._carry = list(carry)
        self.moving = [x for x in carry if not isinstance(x, Lazy)]

    def join(self, moving: Sequence[Any]) -> list[Any]:
        """The whole carry."""
        arrived = iter(moving)
        return [x if isinstance(x, Lazy) else next(arrived) for x in self._carry]

    def split(self, outputs: Sequence[Any], walker: Walker, primitive: str) -> list[Any]:
        """The moving part of a whole new carry. Raises _Changed for a weight that is another."""
        moving = []
        for place, (before, after) in enumerate(zip(self._carry, outputs, strict=True)):
            if not isinstance(before, Lazy):
                moving.append(walker.dense(after, primitive))
            elif not (
                isinstance(after, Lazy)
                and after.array is before.array
                and (after.view, after.dtype) == (before.view, before.dtype)
            ):
                raise _Changed(place)
        return moving


def _with_fixed_carry(
    carry: Sequence[Any],
    attempt: Callable[[_FixedCarry], list[Any]],
    walker: Walker,
    primitive: str,
) -> list[Any]:
    """A loop whose weights are hoisted out of its carry, except those that turn out to change."""
    carry = list(carry)
    while True:
        try:
            return attempt(_FixedCarry(carry))
        except _Changed as changed:
            carry[changed.place] = walker.dense(carry[changed.place], primitive)


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs are constants and carries."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # since JAX 0.12
    return len(consts), len(carry)


def _leading(x: Any, walker: Walker) -> Any:
    """A weight that is scanned over, with the scanned axis in front in its leaves too."""
    if not isinstance(x, Lazy):
        return x
    axis = x.batch_axis(0)
    if axis is None:
        return walker.dense(x, "scan")
    if axis == 0:
        return x
    array = map_stacked(lambda leaf: jnp.moveaxis(leaf, axis, 0), x.array)
    return Lazy(array, x.view.drop(0).stacked(x.shape[0]), x.dtype, x.path)


def _scanned(x: Any) -> tuple[Any, dict[str, Any]]:
    """What is scanned over of x, and what of it is the same at every turn."""
    return apart(x.array) if isinstance(x, Lazy) else (x, {})


def _source(jaxpr: Any, place: int) -> int | None:
    """Which input a jaxpr's output is, if it is one."""
    out = jaxpr.outvars[place]
    return next((i for i, var in enumerate(jaxpr.invars) if var is out), None)
