"""Encoders in files: names of checkpoints old and bare, and heads that a checkpoint lacks."""

import dataclasses
import itertools
import logging
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.checkpoints.names import Parameter, parameters
from qlora_jax.checkpoints.tensors import Tensors
from qlora_jax.errors import QloraError
from qlora_jax.lora import LoraConfig
from qlora_jax.models import family_of
from qlora_jax.models.encoder_config import EncoderConfig
from qlora_jax.quant import QuantizedArray

logger = logging.getLogger("qlora_jax.load")

BODY = ("embeddings", "encoder")
"""What is no head."""


def with_head_in_full(config: LoraConfig, params: Mapping[str, Any]) -> LoraConfig:
    """An encoder's head, which may be new, is trained in full beside the adapters."""
    head = [name for name in params if name not in BODY]
    return dataclasses.replace(config, modules_to_save=(*config.modules_to_save, *head))


_OLD = {"weight": "gamma", "bias": "beta"}
"""What TensorFlow calls the parameters of a LayerNorm."""


@dataclasses.dataclass(frozen=True)
class HeadRequest:
    """The head that a caller wants, None where it is to be the checkpoint's; see `load`."""

    head: str | None = None
    num_labels: int | None = None
    problem_type: str | None = None
    seed: int = 0

    def __bool__(self) -> bool:
        return (self.head, self.num_labels, self.problem_type) != (None, None, None)

    def of(self, config: Any) -> Any:
        """The configuration with that head. Raises QloraError for what is no encoder."""
        if not self:
            return config
        if not isinstance(config, EncoderConfig):
            raise QloraError(
                "head, num_labels and problem_type are settings of an encoder, which a "
                f"{config.model_type} is not"
            )
        head = self.head or config.head
        if head is None:
            raise QloraError("num_labels and problem_type are of a head; say which by head=")
        return config.with_head(head, self.num_labels, self.problem_type)

    def to_make(self, config: Any, fits: Mapping[str, bool], source: str) -> dict[str, Parameter]:
        """The parameters, by path, that have to be made, which the log says.

        fits: path -> whether the checkpoint's has the shape that is wanted, of those that it has.
        A module of the head that is not there at all is made, and so is one that is there for
        another number of labels, if that was asked for.
        """
        if not self:
            return {}
        made: dict[str, Parameter] = {}
        for module, group in itertools.groupby(parameters(config), lambda p: p.path.split("/")[0]):
            own = list(group)
            found = [fits[p.path] for p in own if p.path in fits]
            other = self.num_labels is not None and not all(found)
            if module in BODY or (found and not other):
                continue
            made |= {parameter.path: parameter for parameter in own}
            why = f"is not for {self.num_labels} labels" if found else "is not there"
            logger.warning(
                "%s: its %s %s: initialized at random (seed %d), to be trained",
                source,
                module,
                why,
                self.seed,
            )
        return made

    def make(self, parameter: Parameter, config: EncoderConfig, dtype: DTypeLike) -> jax.Array:
        """One parameter of a head, as transformers initializes it."""
        kind = parameter.path.rpartition("/")[2]
        if kind == "scale":
            return jnp.ones(parameter.shape, jnp.float32)
        if kind == "bias":
            return jnp.zeros(parameter.shape, dtype)
        number = np.uint32(zlib.crc32(parameter.path.encode()))
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        draw = jax.random.normal(key, parameter.shape, jnp.float32)
        return (config.initializer_range * draw).astype(dtype)


class EncoderTensors:
    """An encoder's tensors, whichever of the names in use they have.

    Old files call a LayerNorm's parameters gamma and beta, and those of an encoder alone leave out
    what transformers puts in front of its parts, "bert." for one.
    """

    def __init__(self, tensors: Tensors, config: EncoderConfig) -> None:
        self.source = tensors.source
        self.inside = tensors
        self._prefix = family_of(config).names["embeddings"].partition(".")[0] + "."

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.inside.shapes()

    def not_floating(self) -> dict[str, str]:
        return self.inside.not_floating()

    def name(self, parameter: Parameter, layer: int) -> str:
        return self.inside.name(self._as_stored(parameter), layer)

    def read(self, parameter: Parameter, layer: int) -> np.ndarray | QuantizedArray:
        return self.inside.read(self._as_stored(parameter), layer)

    def ignorable(self, name: str) -> bool:
        if name.removeprefix(self._prefix).split(".")[0] in BODY:
            # Numbers from zero on; and a table that DeBERTa-v3 was trained with and does not use.
            return name.endswith(("position_ids", "embeddings.position_embeddings.weight"))
        return True  # of another head, or the embedding once more

    def _as_stored(self, parameter: Parameter) -> Parameter:
        """The parameter under the name that the file has for it, or its own if it has none."""
        have = self.inside.shapes()
        modules = (parameter.hf_module, parameter.hf_module.removeprefix(self._prefix))
        suffixes = (parameter.suffix, _OLD[parameter.suffix])
        for module, suffix in itertools.product(modules, suffixes):
            known = dataclasses.replace(parameter, hf_module=module, suffix=suffix)
            if known.hf_name(0) in have:
                return known
        return parameter
