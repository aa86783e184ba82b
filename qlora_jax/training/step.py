"""The train step: one pure function of (state, frozen parameters, batch)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlora_jax import lora
from qlora_jax.errors import QloraError
from qlora_jax.lora.config import check_dropout
from qlora_jax.training.masks import combine, partition
from qlora_jax.training.paged import is_paged, settled

Batch = Any
"""A pytree of arrays, such as {"input_ids", "labels", "attention_mask"}, each [B, T]."""

Loss = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
"""loss(params, batch) -> (sum of the token losses, number of tokens), two scalars."""

Metrics = dict[str, jax.Array]

GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""For XLA. cuBLAS adds a product to what is there as it writes, as the adapters' are to the base's,
and reads a layer's dense weight out of its stack; XLA's own products by Triton want copies."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    adapters   what is trained, and what goes with it: see `qlora_jax.lora`
    opt_state  the optimizer's state for what is trained
    step       int32 [], steps taken
    key        random key of the run; step n draws from fold_in(key, n)
    """

    adapters: lora.Adapters
    opt_state: Any
    step: jax.Array
    key: jax.Array

    @classmethod
    def create(
        cls,
        adapters: lora.Adapters,
        optimizer: optax.GradientTransformation,
        key: jax.Array | None = None,
    ) -> "TrainState":
        """The state before the first step; a copy of the adapters, since steps donate the state."""
        leaves, tree = jax.tree.flatten(adapters)
        # One by one, so that those which nobody else holds make room for copies of the next. Going
        # all at once they would leave a hole, and a step needs its room in one piece.
        del adapters
        for number, leaf in enumerate(leaves):
            leaves[number] = jnp.array(leaf)
        adapters = tree.unflatten(leaves)
        trained, _ = _apart(adapters)
        state = cls(
            adapters=adapters,
            opt_state=optimizer.init(trained),
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key(0) if key is None else jnp.array(key),
        )
        paging = any(map(is_paged, jax.tree.leaves(state.opt_state, is_leaf=is_paged)))
        return settled(state, state) if paging else state


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    max_grad_norm: float | None = None,
    accumulate: int = 1,
    dropout: float = 0.0,
    state_shardings: Any = None,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """step(state, params, batch) -> (state, metrics), jit-compiled; `state` is donated.

    loss           `model.loss`, or any function of a parameter tree made fit by `qlora_jax.lift`
    optimizer      any optax transformation; it sees what is trained of the adapters only. One that
                   keeps state in host memory takes `finite`, below, as an extra argument
    max_grad_norm  clip gradients to this global norm (None: do not)
    accumulate     batch leaves are [accumulate, B, ...]; gradients are summed over the first axis
    dropout        probability of dropping inputs of the adapters' A; QloraError outside [0, 1)
    state_shardings  a sharding for every leaf of the state, which it keeps from step to step; None:
                   the compiler's choice
    compiler_options  as in jax.jit; None: GPU_OPTIONS where JAX's platform is a GPU. JAX takes
                   none in a jit within another: pass {} for a step that is called in one

    The objective is the mean over all labelled tokens of the step, whichever micro-batch they are
    in. Gradients exist for the adapters only: `params` is frozen. metrics, fp32 scalars: loss
    (mean, before the update), grad_norm (global, before clipping), tokens (labelled), skipped.

    Where the loss or the gradient is not finite (`finite` is False), skipped is 1 and nothing
    changes but `step`: adapters, optimizer and its schedule are as if this batch had not been.
    """
    # Here as well as in `attach`, which sees it at the first batch only.
    check_dropout(dropout)

    def gradients(
        adapters: lora.Adapters, params: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any]:
        trained, fixed = _apart(adapters)

        def objective(trained: lora.Adapters) -> tuple[jax.Array, jax.Array]:
            adapters = combine(trained, fixed)
            found = loss(lora.attach(params, adapters, dropout=dropout, key=key), batch)
            return _two_scalars(found)

        (total, tokens), grads = jax.value_and_grad(objective, has_aux=True)(trained)
        return total, tokens, grads

    def step(state: TrainState, params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_arrays(batch)
        key = jax.random.fold_in(state.key, state.step)
        if accumulate == 1:
            total, tokens, grads = gradients(state.adapters, params, batch, key)
        else:
            _check_micro_batches(batch, accumulate)

            def micro(carry: Any, xs: Any) -> tuple[Any, None]:
                part, key = xs
                new = gradients(state.adapters, params, part, key)
                return jax.tree.map(jnp.add, carry, new), None

            shapes = jax.eval_shape(
                gradients, state.adapters, params, jax.tree.map(lambda x: x[0], batch), key
            )
            start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            keys = jax.random.split(key, accumulate)
            (total, tokens, grads), _ = jax.lax.scan(micro, start, (batch, keys))
        scale = 1.0 / jnp.maximum(tokens, 1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        norm = optax.tree.norm(grads)
        if max_grad_norm is not None:
            shrink = jnp.minimum(1.0, max_grad_norm / jnp.maximum(norm, 1e-30))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        trained, fixed = _apart(state.adapters)
        update = optax.with_extra_args_support(optimizer).update
        updates, opt_state = update(grads, state.opt_state, trained, finite=finite)
        updated = _choose(finite, optax.apply_updates(trained, updates), trained)
        opt_state = _choose(finite, opt_state, state.opt_state)
        new = TrainState(combine(updated, fixed), opt_state, state.step + 1, state.key)
        skipped = 1.0 - finite.astype(jnp.float32)
        return new, {
            "loss": total * scale,
            "grad_norm": norm,
            "tokens": tokens,
            "skipped": skipped,
        }

    placed: dict[str, Any] = {}
    if state_shardings is not None:
        placed["out_shardings"] = state_shardings, None
    options = _options(compiler_options)
    return jax.jit(step, donate_argnums=0, compiler_options=options, **placed)


def make_eval_step(
    loss: Loss, *, compiler_options: dict[str, Any] | None = None
) -> Callable[[lora.Adapters, Any, Batch], tuple[jax.Array, jax.Array]]:
    """evaluate(adapters, params, batch) -> (sum of token losses, tokens), jit-compiled.

    compiler_options: as in `make_train_step`.
    """

    def evaluate(adapters: lora.Adapters, params: Any, batch: Batch) -> Any:
        return loss(lora.attach(params, adapters), batch)

    return jax.jit(evaluate, compiler_options=_options(compiler_options))


def _options(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None and jax.default_backend() == "gpu":
        return GPU_OPTIONS
    return given or None


def _apart(adapters: lora.Adapters) -> tuple[Any, Any]:
    """(what is trained, what goes with it), each with None where the other has its leaves."""
    return partition(adapters, lora.trained_mask(adapters))


def _choose(finite: jax.Array, new: Any, old: Any) -> Any:
    """One of two trees, element by element: fused into what computes `new`, in the place of `old`,
    where a conditional would keep both."""

    def one(new: jax.Array, old: jax.Array) -> jax.Array:
        # What is not on the device cannot be computed with: its optimizer chose by `finite`.
        if jax.typeof(new).memory_space == jax.memory.Space.Host:
            return new
        return jnp.where(finite, new, old)

    return jax.tree.map(one, new, old)


def _two_scalars(found: Any) -> tuple[jax.Array, jax.Array]:
    pair = isinstance(found, tuple) and len(found) == 2
    if not pair or any(not hasattr(x, "shape") or x.shape for x in found):
        raise QloraError(
            "loss(params, batch) must return two scalars, the sum of the losses and how many they "
            f"are, as model.loss does; it returned {jax.tree.map(jnp.shape, found)}"
        )
    return found


def _check_arrays(batch: Batch) -> None:
    leaves = jax.tree.leaves(batch)
    if not any(jnp.shape(x) for x in leaves):
        raise QloraError(
            f"a batch is a tree of arrays [B, ...], this one has {len(leaves)} scalars, as lists "
            "are read: make arrays of them"
        )


def _check_micro_batches(batch: Batch, accumulate: int) -> None:
    shapes = {tuple(leaf.shape) for leaf in jax.tree.leaves(batch)}
    if any(not shape or shape[0] != accumulate for shape in shapes):
        raise QloraError(
            f"accumulate={accumulate} expects batch leaves [{accumulate}, B, ...], "
            f"got {sorted(shapes)}"
        )
