"""SmolLM3: a Llama in which some layers, every fourth by default, are not rotated (NoPE)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from qlora_jax.errors import QloraError
from qlora_jax.models.config import FULL, SLIDING
from qlora_jax.models.decoder import Rotation
from qlora_jax.models.llama import Llama, LlamaConfig
from qlora_jax.models.typed import checked, entry

_USUAL = {
    "num_key_value_heads": 4,
    "rope_theta": 2000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
}
"""What transformers takes where config.json does not say, as far as Llama's is something else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3Config(LlamaConfig):
    """A Llama-family decoder with NoPE layers (arXiv 2501.18795).

    no_rope_layers has 1 for a layer that is rotated and 0 for one that is not (sic: it is
    config.json's name); where it is empty, all are.
    """

    no_rope_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        odd = set(self.no_rope_layers) - {0, 1}
        if odd or len(self.no_rope_layers) not in (0, self.num_hidden_layers):
            raise QloraError(
                f"no_rope_layers is {list(self.no_rope_layers)}, expected 0 or 1 for each of "
                f"{self.num_hidden_layers} layers"
            )
        super().__post_init__()

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        config = super().from_hf({**_USUAL, **hf})
        rotated = _rotated_layers(hf, config.num_hidden_layers)
        kinds = config.layer_types
        if hf.get("layer_types") is None:
            # Windows, if any, go with the layers that know no positions.
            window = config.sliding_window
            kinds = tuple(SLIDING if window and not there else FULL for there in rotated)
        return dataclasses.replace(config, layer_types=kinds, no_rope_layers=rotated)

    def to_hf(self) -> dict[str, Any]:
        every = (1,) * self.num_hidden_layers
        return super().to_hf() | {"no_rope_layers": list(self.no_rope_layers or every)}


def _rotated_layers(hf: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """no_rope_layers, which may name more layers than there are, or made from the interval."""
    listed = entry(hf, "no_rope_layers", list)
    if listed is not None:
        return tuple(checked("no_rope_layers", item, int) for item in listed[:layers])
    interval = entry(hf, "no_rope_layer_interval", int, 4)
    if interval < 1:
        raise QloraError(f"no_rope_layer_interval is {interval}, expected at least 1")
    return tuple(int((i + 1) % interval != 0) for i in range(layers))


class SmolLM3(Llama):
    """The whole decoder; see `Decoder`."""

    config: SmolLM3Config

    def rotations(self, positions: jax.Array) -> Sequence[Rotation]:
        (turned,) = super().rotations(positions)
        if all(self.config.no_rope_layers):
            return (turned,)
        cos, sin = turned
        return (jnp.ones_like(cos), jnp.zeros_like(sin)), turned

    def rotation_of_layers(self) -> Sequence[int]:
        return self.config.no_rope_layers
