"""What every encoder's configuration has, its head included; read from config.json and written."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

from qlora_jax.errors import QloraError
from qlora_jax.models.classification import MULTI_LABEL, PROBLEMS, REGRESSION, SINGLE_LABEL
from qlora_jax.models.config import (
    check_positive,
    only,
    required,
    special_tokens,
    special_tokens_to_hf,
)
from qlora_jax.models.typed import checked, entry

MASKED_LM, CLASSIFICATION = "masked-lm", "classification"
HEADS = (MASKED_LM, CLASSIFICATION)

# The end of an architecture's name in config.json -> its head; the first is what we write.
_ARCHITECTURES = {
    "ForMaskedLM": MASKED_LM,
    "ForPreTraining": MASKED_LM,
    "ForSequenceClassification": CLASSIFICATION,
    "Model": None,
}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The part of an encoder's configuration that all have. Field names follow config.json.

    head          "masked-lm", "classification" (regression too) or None, the bare encoder
    labels        names of the classes, in order; a regression has one for each number
    problem_type  None, or one of `PROBLEMS`: which loss a classification has, see `loss_of`
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    head: str | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str | None = None
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_positive(
            self,
            (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
            ),
        )
        if self.hidden_size % self.num_attention_heads:
            raise QloraError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head not in (*HEADS, None):
            raise QloraError(f"head {self.head!r} is not supported; known: {', '.join(HEADS)}")
        if self.head == CLASSIFICATION and not self.labels:
            raise QloraError("a classification needs at least one label, got none")
        if self.problem_type not in (*PROBLEMS, None):
            raise QloraError(
                f"problem_type {self.problem_type!r} is not supported; known: {', '.join(PROBLEMS)}"
            )
        if self.head == MASKED_LM and not self.tie_word_embeddings:
            raise QloraError("a masked-lm head apart from the embedding is not supported")
        self.check_activation("hidden_act")

    def check_activation(self, field: str) -> None:
        """Raises QloraError if the field names a function that we do not have."""
        if getattr(self, field) not in ACTIVATIONS:
            raise QloraError(
                f"{field} {getattr(self, field)!r} is not supported; known: "
                f"{', '.join(ACTIVATIONS)}"
            )

    @property
    def head_dim(self) -> int:
        """Dh, the size of an attention head."""
        return self.hidden_size // self.num_attention_heads

    def with_head(
        self, head: str, num_labels: int | None = None, problem_type: str | None = None
    ) -> Self:
        """The same encoder under another head; labels keep their names if they stay as many."""
        labels = self.labels
        if num_labels is not None and num_labels != len(labels):
            labels = default_labels(num_labels)
        problem = problem_type if problem_type is not None else self.problem_type
        return dataclasses.replace(self, head=head, labels=labels, problem_type=problem)

    def loss_of(self, labels: jax.Array) -> str:
        """The loss for labels of this type, as transformers chooses where none is set.

        One label is a regression; whole numbers are classes; others say how true each label is.
        """
        if self.problem_type is not None:
            return self.problem_type
        if len(self.labels) == 1:
            return REGRESSION
        return SINGLE_LABEL if jnp.issubdtype(labels.dtype, jnp.integer) else MULTI_LABEL


def default_labels(count: int) -> tuple[str, ...]:
    """Names of labels that have none, as transformers gives them."""
    return tuple(f"LABEL_{i}" for i in range(count))


def read_common(hf: Mapping[str, Any], **usual: Any) -> dict[str, Any]:
    """The fields of `EncoderConfig` in a config.json; usual: what a family takes for granted."""
    sizes = required(
        hf,
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    only(hf, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    kinds: dict[str, type] = {
        "max_position_embeddings": int,
        "type_vocab_size": int,
        "hidden_act": str,
        "layer_norm_eps": float,
        "initializer_range": float,
        "problem_type": str,
        "tie_word_embeddings": bool,
    }
    given = {key: entry(hf, key, kind) for key, kind in kinds.items()}
    tokens = {key: x for key, x in special_tokens(hf).items() if x not in (None, ())}
    return {
        **usual,
        **sizes,
        **{key: value for key, value in given.items() if value is not None},
        **tokens,
        "model_type": hf["model_type"],
        "head": _read_head(hf),
        "labels": _read_labels(hf),
    }


def write_common(config: EncoderConfig, architecture: str) -> dict[str, Any]:
    """The inverse of `read_common`; architecture: how transformers' names of the family begin."""
    ending = next(end for end, head in _ARCHITECTURES.items() if head == config.head)
    names = [field.name for field in dataclasses.fields(EncoderConfig)]
    out = {name: getattr(config, name) for name in names if name not in ("head", "labels")}
    out |= special_tokens_to_hf(config)
    return out | {
        "architectures": [architecture + ending],
        "id2label": {str(i): name for i, name in enumerate(config.labels)},
        "label2id": {name: i for i, name in enumerate(config.labels)},
    }


def _read_head(hf: Mapping[str, Any]) -> str | None:
    """None too for heads that we do not have: their encoder can be given another."""
    names = entry(hf, "architectures", list, [])
    name = checked("architectures", names[0], str) if names else ""
    return next((head for end, head in _ARCHITECTURES.items() if name.endswith(end)), None)


def _read_labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    names = entry(hf, "id2label", Mapping)
    if names is None:
        return default_labels(entry(hf, "num_labels", int, 2))
    numbers = [str(i) for i in range(len(names))]
    if {str(key) for key in names} != set(numbers):
        raise QloraError(f"id2label numbers its labels {sorted(names)}, expected {numbers}")
    by_number = {str(key): name for key, name in names.items()}
    return tuple(checked("id2label", by_number[number], str) for number in numbers)
