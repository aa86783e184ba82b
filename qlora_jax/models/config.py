"""What every decoder's configuration has, read from (and written to) Hugging Face's config.json."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from qlora_jax.errors import QloraError
from qlora_jax.models.typed import checked, entry, needed

MOST_LAYERS = 10_000
"""More than any model has. Settings are lists with an entry a layer, so that a damaged number of
layers would fill the memory."""
FULL, SLIDING = "full_attention", "sliding_attention"
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The part of a decoder's configuration that its layers share: see `decoder.Decoder`.

    Field names follow config.json where it has them. layer_types holds one of "full_attention" and
    "sliding_attention" for every layer; the latter sees the last `sliding_window` tokens.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    sliding_window: int | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, _SIZES)
        if len(self.layer_types) != self.num_hidden_layers:
            raise QloraError(
                f"layer_types names {len(self.layer_types)} layers, "
                f"num_hidden_layers is {self.num_hidden_layers}"
            )
        unknown = sorted(set(self.layer_types) - {FULL, SLIDING})
        if unknown:
            raise QloraError(f"layer types {unknown} are not supported; known: {[FULL, SLIDING]}")
        if SLIDING in self.layer_types and not self.sliding_window:
            raise QloraError("layer_types names sliding_attention, but sliding_window is not set")
        if self.num_attention_heads % self.num_key_value_heads:
            raise QloraError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def stacks(self) -> Mapping[str, Sequence[int]]:
        """The decoder's stacks of layers, and which of the layers each holds."""
        return {"layers": range(self.num_hidden_layers)}

    @property
    def changes_at(self) -> int | None:
        """The length of a batch beyond which its tokens have other keys and values, so that a cache
        of fewer does not serve any more; None: there is none."""
        return None

    @property
    def padding_matters(self) -> bool:
        """Whether the loss has to know which tokens are padding, beside that they have no label."""
        return False

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """Reads a config.json. Raises QloraError for a family or a switch that is not supported."""
        raise NotImplementedError

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers (4 and 5) reads back to the same model."""
        raise NotImplementedError


def check_positive(config: Any, names: Iterable[str]) -> None:
    """Raises QloraError for a field below 1, and for one too large to be the size of an array."""
    for name in names:
        if not 1 <= (value := getattr(config, name)) < 2**31:
            raise QloraError(f"{name} is {value}, expected at least 1 and less than 2^31")


def required(hf: Mapping[str, Any], *names: str) -> dict[str, int]:
    """Whole numbers of a config.json, among them num_hidden_layers.

    Raises QloraError that lists the missing ones, and for more than `MOST_LAYERS` layers.
    """
    missing = [key for key in names if hf.get(key) is None]
    if missing:
        raise QloraError(f"config.json of a {hf.get('model_type')} model lacks {missing}")
    sizes = {key: needed(hf, key, int) for key in names}
    if (layers := sizes.get("num_hidden_layers", 1)) > MOST_LAYERS:
        raise QloraError(f"num_hidden_layers is {layers}, expected at most {MOST_LAYERS}")
    return sizes


def only(hf: Mapping[str, Any], **supported: Any) -> None:
    """Raises QloraError for a setting with another value than the one that is supported."""
    for key, value in supported.items():
        if hf.get(key, value) != value:
            raise QloraError(f"{key} {hf[key]!r} is not supported; only {value!r} is")


def layer_types(hf: Mapping[str, Any], usual: list[str]) -> tuple[str, ...]:
    """The kind of attention of every layer, `usual` if config.json does not say."""
    types = entry(hf, "layer_types", list)
    return tuple(checked("layer_types", kind, str) for kind in (usual if types is None else types))


def special_tokens(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of that name: one token or none, for the end also several."""
    ends = hf.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return {
        "bos_token_id": entry(hf, "bos_token_id", int),
        "eos_token_id": tuple(checked("eos_token_id", end, int) for end in ends),
        "pad_token_id": entry(hf, "pad_token_id", int),
    }


def special_tokens_to_hf(config: Any) -> dict[str, Any]:
    """The inverse of `special_tokens`."""
    ends = list(config.eos_token_id)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": config.pad_token_id,
    }


def shared_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The entries of config.json that are called the same in (nearly) every family."""
    return {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        **special_tokens_to_hf(config),
    }
