"""A head that is tied to its embedding, which PEFT's files hold twice."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora_jax.checkpoints.peft.description import PREFIX
from qlora_jax.errors import QloraError
from qlora_jax.lora import Adapters, LoraWeights
from qlora_jax.models import family_of
from qlora_jax.models.encoder_config import MASKED_LM

EMBEDDING = "embed_tokens/embedding"
"""The path of every decoder's table."""
_WORDS, _SHARED = "embeddings/word_embeddings/embedding", "shared/embedding"
# What PEFT stores of a tied head, and of which tensor of the embedding it is the transpose.
_TIED = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}


def is_tied(model: Any) -> bool:
    """Whether the model is a decoder whose head is its embedding."""
    return "embed_tokens" in family_of(model.config).names and model.config.tie_word_embeddings


def peft_ties(model: Any) -> bool:
    """Whether PEFT ties to the head what is added to the embedding; it goes by this name alone."""
    return family_of(model.config).names["embed_tokens"].endswith("embed_tokens")


def tied_head(tensors: Mapping[str, np.ndarray], model: Any) -> dict[str, np.ndarray]:
    """The head's tensors, which under ensure_weight_tying repeat those of the embedding."""
    if not is_tied(model):
        return {}
    names = family_of(model.config).names
    table, head = (f"{PREFIX}{names[module]}." for module in ("embed_tokens", "lm_head"))
    out = {
        head + ours: np.ascontiguousarray(tensors[table + theirs].T)
        for ours, theirs in _TIED.items()
        if table + theirs in tensors
    }
    if f"{table}weight" in tensors:
        out[f"{head}weight"] = tensors[f"{table}weight"].copy()
    return out


def check_tied(adapters: Adapters, model: Any) -> None:
    """Raises QloraError for an adapter of a tied embedding that PEFT has no form for."""
    if _WORDS in adapters and getattr(model.config, "head", None) == MASKED_LM:
        raise QloraError(
            f"{_WORDS}: the masked-lm head is tied to it, and PEFT keeps an adapter of the one "
            "apart from the other; leave it out of the targets"
        )
    if _SHARED in adapters:
        raise QloraError(
            f"{_SHARED}: encoder and decoder of transformers' T5 have it under names of their own, "
            "so that PEFT's adapter of it would do nothing; leave it out of the targets"
        )
    adapter = adapters.get(EMBEDDING)
    if adapter is None or not is_tied(model):
        return
    if not peft_ties(model):
        module = family_of(model.config).names["embed_tokens"]
        raise QloraError(
            f"the adapter of {module} is also of the head tied to it, which PEFT cannot express "
            "for a module of this name; leave it out of the targets"
        )
    if isinstance(adapter, LoraWeights) and adapter.magnitude is not None:
        raise QloraError(
            f"{EMBEDDING}: the model's head is tied to it, and PEFT gives embedding and head norms "
            "of their own under DoRA; leave it out of the targets"
        )
