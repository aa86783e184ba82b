"""The walk over a jaxpr: every equation as it is, except those that a lazy weight enters."""

import logging
from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn, Literal

from qlora_jax.errors import QloraError
from qlora_jax.lifting import control, grouped, products, sharded, views
from qlora_jax.lifting.lazy import Lazy

logger = logging.getLogger("qlora_jax.lift")

CONTROL = {
    "jit": control.call,
    "pjit": control.call,
    "closed_call": control.call,
    "core_call": control.call,
    "remat2": control.remat,
    "checkpoint": control.remat,
    "scan": control.scan,
    "while": control.while_loop,
    "cond": control.cond,
    "custom_jvp_call": control.custom_jvp,
    "custom_vjp_call": control.custom_vjp,
    "optimization_barrier": control.optimization_barrier,
    "shard_map": sharded.shard_map,
}
PRODUCTS = {
    "dot_general": products.dot_general,
    "gather": products.gather,
    "conv_general_dilated": products.conv_general_dilated,
    "ragged_dot_general": grouped.ragged_dot_general,
}


class Evaluation:
    """One evaluation of a lifted function. `seen` holds what has been logged already."""

    def __init__(self, *, strict: bool, seen: set[tuple[str, str]]) -> None:
        self._strict = strict
        self._seen = seen

    def walk(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The outputs of `jaxpr`, in which weights may still be lazy."""
        values: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        values.update(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            with eqn.ctx.manager:
                outputs = self._evaluate(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _evaluate(self, eqn: JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        if any(isinstance(x, Lazy) for x in inputs):
            if name in CONTROL:
                return CONTROL[name](eqn, inputs, self)
            output = None
            if name in views.RULES and isinstance(inputs[0], Lazy):
                output = views.RULES[name](eqn, *inputs)
            elif name in PRODUCTS:
                output = PRODUCTS[name](eqn, *inputs)
            if output is not None:
                return [output]
            inputs = [self.dense(x, name) for x in inputs]
        # Bound whole, so that its own rules for derivatives, batching and lowering hold.
        output = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
        return output if eqn.primitive.multiple_results else [output]

    def dense(self, x: Any, primitive: str) -> Any:
        """x, made dense if it is lazy: logged once, or an error under `strict`."""
        if not isinstance(x, Lazy):
            return x
        if self._strict:
            raise QloraError(
                f"{x.path}: {primitive} has no rule for a quantized or adapted weight of shape "
                f"{x.shape}, and strict=True forbids making it dense"
            )
        if (primitive, x.path) not in self._seen:
            self._seen.add((primitive, x.path))
            logger.warning("%s is made dense for %s at every call", x.path, primitive)
        return x.dense()
