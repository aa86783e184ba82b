"""Where a train step's memory goes, counted and estimated from shapes."""

import dataclasses
import math
import re
from typing import Any

import jax

from qlora_jax import lora
from qlora_jax.quant import QuantizedArray, is_quantized, path_str
from qlora_jax.quant.policy import OUTPUT_HEAD
from qlora_jax.training.masks import partition
from qlora_jax.training.paged import is_paged
from qlora_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes on each device while a step runs, but for the two of the host.

    codes           of the frozen 4-bit weights
    scales          of their blocks, with what those are quantized by
    embeddings      tables and output head, where they are not in 4 bits
    dense           norms, biases and all else that is not
    adapters        what is trained, and what goes with it
    optimizer       its state
    gradients       of what is trained
    activations     what the forward pass leaves for the backward pass
    working         the rest: what the layer, the loss or the update that is under way needs
    optimizer_host  of the optimizer's state, in the host's memory
    activations_host  likewise
    """

    codes: int
    scales: int
    embeddings: int
    dense: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    working: int
    optimizer_host: int = 0
    activations_host: int = 0

    @property
    def total(self) -> int:
        """Bytes of each device."""
        return self.arguments + self.temporaries

    @property
    def arguments(self) -> int:
        """What is there before the step and after it."""
        parts = (self.codes, self.scales, self.embeddings, self.dense, self.adapters)
        return sum(parts) + self.optimizer

    @property
    def temporaries(self) -> int:
        """What is there while it runs."""
        return self.gradients + self.activations + self.working

    @property
    def host(self) -> int:
        """Bytes of the host's memory, pinned, for each device."""
        return self.optimizer_host + self.activations_host

    def measured(self, temporaries: int) -> "Footprint":
        """The same with what a compiler says of all temporaries together.

        Where that is less than gradients and activations come to, it keeps some of them in other
        form, or not all of them at once, and the activations are what it leaves of them.
        """
        gradients = min(self.gradients, temporaries)
        activations = min(self.activations, temporaries - gradients)
        working = temporaries - gradients - activations
        return dataclasses.replace(
            self, gradients=gradients, activations=activations, working=working
        )


def count(state: TrainState, params: Any) -> Footprint:
    """The arguments' part of a footprint, from arrays or shapes. Those that have a sharding count
    with what one device holds."""
    sums = dict.fromkeys(("codes", "scales", "embeddings", "dense"), 0)
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]
    for path, leaf in leaves:
        if isinstance(leaf, QuantizedArray):
            sums["codes"] += nbytes(leaf.codes)
            sums["scales"] += tree_bytes(leaf) - nbytes(leaf.codes)
            continue
        name = path_str(path)
        table = name.endswith("/embedding") or re.fullmatch(OUTPUT_HEAD, name)
        sums["embeddings" if table else "dense"] += nbytes(leaf)
    optimizer = jax.tree.leaves(state.opt_state, is_leaf=is_paged)
    trained, _ = partition(state.adapters, lora.trained_mask(state.adapters))
    return Footprint(
        **sums,
        adapters=tree_bytes(state.adapters),
        optimizer=sum(nbytes(x) for x in optimizer if not is_paged(x)),
        optimizer_host=sum(tree_bytes(x) for x in optimizer if is_paged(x)),
        gradients=tree_bytes(trained),
        activations=0,
        working=0,
    )


def nbytes(x: Any) -> int:
    """Bytes of a leaf's part on one device."""
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def tree_bytes(tree: Any) -> int:
    """Of all leaves."""
    return sum(map(nbytes, jax.tree.leaves(tree)))
