"""What is to be planned: a model, its adapters and a training run, as data that fits in JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import QloraError
from qlora_jax.lora import LoraConfig
from qlora_jax.models import read_config
from qlora_jax.models.encoder_config import CLASSIFICATION, EncoderConfig
from qlora_jax.parallel.mesh import ROWS, complete, parse_mesh
from qlora_jax.quant import NF4, QuantConfig
from qlora_jax.training.settings import TrainSettings


def context(config: Any) -> int | None:
    """The most tokens that a sequence may have; None: no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    # RoBERTa's table of positions begins with some that no token has.
    return None if limit is None else limit - getattr(config, "first_position", 0)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step.

    about         the model's config.json
    time          T, tokens of a sequence; of an encoder-decoder on either side
    lora          the adapters
    training      the run; its batch size is of all devices together
    quantization  of the frozen weights; None: dense
    dtype         of the computation and of weights that stay dense
    mesh          sizes of its axes, "data=2,fsdp=4", where there are several devices; None: all of
                  them along fsdp
    """

    about: Mapping[str, Any]
    time: int
    lora: LoraConfig = LoraConfig()
    training: TrainSettings = TrainSettings()
    quantization: QuantConfig | None = NF4()
    dtype: str = "bfloat16"
    mesh: str | None = None

    def config(self) -> Any:
        """The model's configuration; an encoder without a head gets one for classification.

        Raises QloraError for a family that is not supported and more tokens than it has positions.
        """
        config = read_config(self.about)
        limit = context(config)
        if limit is not None and self.time > limit:
            raise QloraError(
                f"a sequence of {self.time} tokens is longer than the model's context of {limit}"
            )
        if self.time < 2:
            raise QloraError(f"a sequence needs at least two tokens, got {self.time}")
        if isinstance(config, EncoderConfig) and config.head is None:
            return config.with_head(CLASSIFICATION, None, None)
        return config

    def axes(self, devices: int) -> dict[str, int]:
        """The sizes of the mesh over so many. Raises QloraError for those that do not fit."""
        return complete(parse_mesh(self.mesh) if self.mesh else {}, devices)

    def rows(self, devices: int) -> int:
        """What a batch has to be a multiple of."""
        return math.prod(self.axes(devices)[name] for name in ROWS)

    @property
    def batch(self) -> int:
        return self.training.batch_size

    def with_training(self, **changes: Any) -> "Workload":
        """The same with other settings of the run. Raises QloraError for values out of range."""
        return dataclasses.replace(self, training=dataclasses.replace(self.training, **changes))

    def with_time(self, time: int) -> "Workload":
        """The same with sequences of another length."""
        training = dataclasses.replace(self.training, sequence_length=None)
        return dataclasses.replace(self, time=time, training=training)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Workload":
        """What `to_json` wrote."""
        fields = json.loads(text)
        quantization = fields.pop("quantization")
        return cls(
            lora=LoraConfig(**fields.pop("lora")),
            training=TrainSettings(**fields.pop("training")),
            quantization=quantization and QuantConfig(**quantization),
            **fields,
        )
