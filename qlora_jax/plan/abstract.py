"""A whole train step from shapes alone: nothing is allocated, nothing is read but config.json."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from qlora_jax import lora
from qlora_jax.checkpoints.heads import with_head_in_full
from qlora_jax.checkpoints.load import assemble
from qlora_jax.errors import QloraError
from qlora_jax.models import T5Config, abstract_params
from qlora_jax.models.attention import AttentionImplementation
from qlora_jax.models.encoder_config import CLASSIFICATION, EncoderConfig
from qlora_jax.parallel.layout import Layout
from qlora_jax.parallel.rules import in_host_memory
from qlora_jax.plan.workload import Workload
from qlora_jax.quant import QuantConfig, quantize_tree
from qlora_jax.training.estimate import attention_of, estimate
from qlora_jax.training.footprint import Footprint, count
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.step import TrainState, make_train_step

_STEPS = 1000
"""Of the learning rate's schedule, which takes no memory."""


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A jitted step, and the shapes of its three arguments: `state`, the model's `params`, and
    `batch`."""

    step: Any
    model: Any
    state: TrainState
    batch: Any
    training: TrainSettings

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        return self.state, self.model.params, self.batch

    def placed(self, where: Sharding | Layout) -> "AbstractStep":
        """The shapes with shardings: on one device, or over a mesh; a paged optimizer's state is in
        the host's memory. Raises QloraError for a batch that the mesh cannot share."""

        def on(x: Any, sharding: Sharding) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        if isinstance(where, Layout):
            params = where.params(self.model.params)
            shardings = where.state_shardings(self.state)
            batch = where.batch(self.batch, axis=int(self.training.accumulate > 1))
        else:
            params = jax.tree.map(lambda x: on(x, where), self.model.params)
            shardings = in_host_memory(self.state, jax.tree.map(lambda _: where, self.state))
            batch = jax.tree.map(lambda x: on(x, where), self.batch)
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, params=params),
            state=jax.tree.map(on, self.state, shardings),
            batch=batch,
        )

    def attention(self, kernels: Collection[AttentionImplementation]) -> AttentionImplementation:
        """Which attention the step has on a device on which those kernels run. Raises QloraError
        if the settings name one that does not."""
        named = self.training.attention
        if named is None:
            return attention_of(self.model, self.batch, kernels)
        if named not in ("xla", *kernels):
            there = " or ".join(("xla", *kernels))
            raise QloraError(f"attention {named!r} does not run on this device, {there} does")
        return named

    def estimate(
        self,
        where: Sharding | Layout,
        *,
        decoded: int,
        kernels: Collection[AttentionImplementation] = (),
    ) -> Footprint:
        """What the step takes of each device by formula; see `estimate` and `attention`."""
        placed = self.placed(where)
        return estimate(
            self.model,
            self.state,
            self.batch,
            count(placed.state, placed.model.params),
            remat=self.training.remat,
            accumulate=self.training.accumulate,
            decoded=decoded,
            attention=self.attention(kernels),
            rows=where.row_parts if isinstance(where, Layout) else 1,
        )


def train_step(
    config: Any,
    time: int,
    adapters: lora.LoraConfig,
    training: TrainSettings,
    quantization: QuantConfig | None,
    dtype: Any,
) -> AbstractStep:
    """The step that `train` would run of a model of that configuration; see `Workload`."""
    params = abstract_params(config, dtype)
    if quantization is not None:
        params = quantize_tree(params, quantization)
    model = assemble(config, params, None, "plan", dtype)
    # What adapters start from makes no difference to their shapes; some of it needs the weights.
    adapters = dataclasses.replace(adapters, init="default")
    if isinstance(config, EncoderConfig):
        adapters = with_head_in_full(adapters, params)
    optimizer = training.make_optimizer(_STEPS)

    def start(key: jax.Array) -> TrainState:
        return TrainState.create(lora.init(key, params, adapters), optimizer, key)

    step = make_train_step(
        functools.partial(model.loss, remat=training.remat),
        optimizer,
        max_grad_norm=training.max_grad_norm,
        accumulate=training.accumulate,
        dropout=adapters.dropout,
    )
    state = jax.eval_shape(start, jax.random.key(0))
    return AbstractStep(step, model, state, _batch(config, time, training), training)


def of_workload(workload: Workload) -> AbstractStep:
    """The workload's step. Raises QloraError as `Workload.config` and `lora.init` do."""
    return train_step(
        workload.config(),
        workload.time,
        workload.lora,
        workload.training,
        workload.quantization,
        jnp.dtype(workload.dtype),
    )


def _batch(config: Any, time: int, training: TrainSettings) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaves [B, T], or [accumulate, B, T]; what the model's `loss` reads."""
    lead = (training.batch_size,)
    if training.accumulate > 1:
        lead = (training.accumulate, *lead)
    tokens = jax.ShapeDtypeStruct((*lead, time), jnp.int32)
    labels = tokens
    if isinstance(config, EncoderConfig) and config.head == CLASSIFICATION:
        one = config.problem_type in (None, "single_label_classification")
        labels = jax.ShapeDtypeStruct(lead if one else (*lead, len(config.labels)), jnp.int32)
        if not one:
            labels = jax.ShapeDtypeStruct(labels.shape, jnp.float32)
    batch = {"input_ids": tokens, "labels": labels, "attention_mask": tokens}
    if training.packing:
        batch["segment_ids"] = tokens
    if isinstance(config, T5Config):
        batch["decoder_attention_mask"] = tokens
    return batch
