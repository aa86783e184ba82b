"""What a train step takes, by formula: in a second, without a compiler."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from qlora_jax import lora
from qlora_jax.models.attention import AttentionImplementation, choose
from qlora_jax.models.attention_xla import BLOCK, SPANS
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.loss import CHUNK
from qlora_jax.models.masks import Mask
from qlora_jax.quant import QuantizedArray, is_quantized
from qlora_jax.quant.pieces import LIMIT as PIECE
from qlora_jax.training.footprint import Footprint
from qlora_jax.training.masks import combine, partition
from qlora_jax.training.paged import PAGE_BYTES
from qlora_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that the forward pass keeps for the backward pass, on the device and in the host's
    memory, and what of them is one layer's."""

    device: int
    host: int
    layer: int


def kept(loss: Any, state: TrainState, params: Any, batch: Any) -> Kept:
    """Read from the jaxpr of `jax.vjp`: what the forward pass hands to the backward pass, but for
    arguments handed through. Of a step that accumulates, `batch` is one micro-batch."""
    trained, fixed = partition(state.adapters, lora.trained_mask(state.adapters))

    def residuals(trained: Any, fixed: Any, params: Any, batch: Any) -> Any:
        def objective(trained: Any) -> Any:
            return loss(lora.attach(params, combine(trained, fixed)), batch)

        return jax.vjp(objective, trained, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(residuals)(trained, fixed, params, batch).jaxpr
    scans = {
        id(out): (eqn, number)
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "scan"
        for number, out in enumerate(eqn.outvars)
    }
    seen = {id(variable) for variable in (*jaxpr.invars, *jaxpr.constvars)}
    device = host = layer = 0
    for variable in jaxpr.outvars:
        if isinstance(variable, jax.extend.core.Literal):
            continue
        eqn, number = scans.get(id(variable), (None, 0))
        # Where parts of a layer keep the same array, the scan over layers puts it out several
        # times; XLA makes one of them.
        body = jaxpr if eqn is None else eqn.params["jaxpr"].jaxpr
        source = _source(body, variable if eqn is None else body.outvars[number])
        if id(variable) in seen or id(source) in seen:
            continue
        seen |= {id(variable), id(source)}
        size = math.prod(variable.aval.shape) * variable.aval.dtype.itemsize
        if variable.aval.memory_space.name == "Host":
            host += size
        else:
            device += size
            layer += 0 if eqn is None else size // eqn.params["length"]
    return Kept(device, host, layer)


def _source(jaxpr: Any, variable: Any) -> Any:
    """The variable of `jaxpr` that `variable` is another name of: what is rematerialized hands out
    what it was given and is to be kept."""
    made = {id(out): (eqn, n) for eqn in jaxpr.eqns for n, out in enumerate(eqn.outvars)}
    while id(variable) in made:
        eqn, number = made[id(variable)]
        if eqn.primitive.name == "name":
            variable = eqn.invars[0]
            continue
        if eqn.primitive.name != "remat2":  # jax.checkpoint's
            break
        inner = eqn.params["jaxpr"]
        out = _source(inner, inner.outvars[number])
        given = [id(x) for x in inner.invars]
        if id(out) not in given:
            break
        variable = eqn.invars[given.index(id(out))]
    return variable


DECODED = {"xla": 3, "cuda": 1, "pallas_tpu": 0, "pallas_gpu": 0}
"""Implementation of 4-bit products -> how many weights are dense at a time. XLA decodes them ahead
of their products, the CUDA kernels one for a product with many rows, the others on the way."""


def estimate(
    model: Any,
    state: TrainState,
    batch: Any,
    counted: Footprint,
    *,
    remat: Any,
    decoded: int,
    attention: AttentionImplementation,
    accumulate: int = 1,
    rows: int = 1,
) -> Footprint:
    """The footprint of a step, from arrays or shapes.

    model    a `Model` or its like; state and batch: as of its step, all of it
    counted  its arguments' part, as `count` finds it of what one device holds
    remat    the policy, accumulate the micro-batches of the step
    decoded  how many weights, or pieces of large ones, are dense at a time: see `DECODED`
    attention  which code computes it
    rows     devices that the rows of a batch are split over
    """
    micro = batch if accumulate == 1 else jax.tree.map(_first, batch)

    def keeps(remat: Any) -> Kept:
        def loss(params: Any, batch: Any) -> Any:
            return model.loss(params, batch, remat=remat)

        return kept(loss, state, model.params, micro)

    found = keeps(remat)
    # The layer whose gradient is taken has all that it needs, computed again or not, and the
    # gradients of about as much.
    all_kept = found if remat == "none" else keeps("none")
    layer = (all_kept.layer if remat == "none" else 2 * all_kept.layer) // rows
    numbers = decoded * min(_widest(model.params), PIECE)
    dense = numbers * jnp.dtype(model.dtype).itemsize
    layer += dense
    if attention == "xla":
        layer += _scores(model.config, micro["input_ids"].shape) // rows
    # The sum of the micro-batches' gradients, and the next one's.
    gradients = counted.gradients * (1 if accumulate == 1 else 2)
    # A chunk's logits, their exponentials and their gradient, fp32; there are no gradients yet.
    logits = 3 * CHUNK * model.config.vocab_size * 4
    # A paged optimizer's state visits two pages at a time, when the activations are gone.
    update = 2 * min(PAGE_BYTES, counted.optimizer_host) - found.device // rows
    return dataclasses.replace(
        counted,
        gradients=gradients,
        activations=found.device // rows,
        activations_host=found.host // rows,
        working=max(layer, logits - gradients, update),
    )


def attention_of(
    model: Any, batch: Mapping[str, Any], kernels: Collection[AttentionImplementation]
) -> AttentionImplementation:
    """Which code computes the attention of a step on such a batch where those kernels run."""
    config = model.config
    if not isinstance(config, DecoderConfig):
        return "xla"  # encoders attend in ways of their own
    shape = batch["input_ids"].shape[-2:]
    q = jax.ShapeDtypeStruct((*shape, config.num_attention_heads, config.head_dim), model.dtype)
    valid: Any = batch.get("attention_mask") if config.padding_matters else None
    mask = Mask(valid=valid, segment_ids=batch.get("segment_ids"))
    return choose(q, q, mask, getattr(config, "attn_logit_softcapping", None), kernels)


def _scores(config: Any, shape: tuple[int, ...]) -> int:
    """XLA's scores of one layer's attention and their gradients, fp32, each of a half: a query has
    those of the keys before it. Of long sequences a block of each span's queries at a time."""
    batch, time = shape
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    return batch * heads * time * min(time, SPANS * BLOCK) * 4


def _widest(params: Any) -> int:
    """Numbers in the largest 4-bit weight of a layer, the experts of one together."""
    sizes = [
        leaf.size // (leaf.shape[0] if leaf.batch_shape else 1)
        for leaf in jax.tree.leaves(params, is_leaf=is_quantized)
        if isinstance(leaf, QuantizedArray)
    ]
    return max(sizes, default=0)


def _first(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
