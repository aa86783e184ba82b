"""Every family there is, by Hugging Face's model_type, and a model's functions of its parameters.

The functions take the parameters as a nested dict of arrays, which is what the rest of the library
(and `jax.grad`) works with.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
from qlora_jax.models import bert, deberta, gemma, gpt2, llama, moe, phi3, smollm3, t5
from qlora_jax.models.cache import Cache
from qlora_jax.models.products import in_pieces
from qlora_jax.models.remat import Remat

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """What is known of a family: its configuration, its module, and its names in files.

    config     dataclass with from_hf(config.json) and to_hf()
    module     called as module(config, dtype=, param_dtype=, rngs=)
    names      our module -> Hugging Face's, with {} for the number of the layer (then of the
               expert); the longest entry that a parameter's path starts with counts, what follows
               it has the same names
    as_stored  last names of linear modules whose weight files hold as [in, out], not transposed
    prefixes   how a name in files begins -> how it may begin instead
    unused     regular expression for names of tensors in files that are passed over
    """

    config: Any
    module: Callable[..., nnx.Module]
    names: Mapping[str, str]
    as_stored: frozenset[str] = frozenset()
    prefixes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    unused: str = ""


_LLAMA = Family(llama.LlamaConfig, llama.Llama, llama.NAMES)
_GEMMA = Family(gemma.GemmaConfig, gemma.Gemma, gemma.NAMES)
_GEMMA3 = dataclasses.replace(_GEMMA, prefixes=gemma.PREFIXES, unused=gemma.UNUSED)
_GPT2 = Family(gpt2.GPT2Config, gpt2.GPT2, gpt2.NAMES, gpt2.AS_STORED, gpt2.PREFIXES, gpt2.UNUSED)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": Family(moe.MoeConfig, moe.Moe, moe.MIXTRAL_NAMES),
    "qwen3_moe": Family(moe.MoeConfig, moe.Moe, moe.QWEN3_MOE_NAMES),
    "phi3": Family(phi3.Phi3Config, phi3.Phi3, llama.NAMES),
    "smollm3": Family(smollm3.SmolLM3Config, smollm3.SmolLM3, llama.NAMES),
    gemma.GEMMA1: _GEMMA,
    gemma.GEMMA2: _GEMMA,
    gemma.GEMMA3: _GEMMA3,
    gemma.WITH_VISION: _GEMMA3,
    "gpt2": _GPT2,
    "bert": Family(bert.BertConfig, bert.Bert, bert.NAMES),
    "roberta": Family(bert.BertConfig, bert.Bert, bert.ROBERTA_NAMES),
    "deberta-v2": Family(deberta.DebertaConfig, deberta.Deberta, deberta.NAMES),
    "t5": Family(t5.T5Config, t5.T5, t5.NAMES, unused=t5.UNUSED),
}


def read_config(hf: Mapping[str, Any]) -> Any:
    """The configuration in a config.json.

    Raises QloraError for a family or a switch that is not supported.
    """
    family = FAMILIES.get(str(hf.get("model_type")))
    if family is None:
        raise QloraError(
            f"model_type {hf.get('model_type')!r} is not supported; known families: "
            f"{', '.join(FAMILIES)}"
        )
    return family.config.from_hf(hf)


def family_of(config: Any) -> Family:
    """The family that a configuration belongs to."""
    return FAMILIES[config.model_type]


@functools.cache
def _abstract(
    config: Any, dtype: np.dtype, param_dtype: np.dtype, dense: bool = False
) -> tuple[Any, Any]:
    """The module's structure and its parameters as shapes; nothing is allocated."""
    make = family_of(config).module
    model = nnx.eval_shape(
        lambda: make(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )
    if dense:
        for _, module in nnx.iter_graph(model):
            if isinstance(module, nnx.Linear):
                module.dot_general = in_pieces
    return nnx.split(model)


def abstract_params(config: Any, param_dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """The parameter tree as ShapeDtypeStructs (norm scales are fp32 whatever `param_dtype`)."""
    dtype = np.dtype(param_dtype)
    return nnx.to_pure_dict(_abstract(config, dtype, dtype)[1])


def init_params(
    config: Any, key: jax.Array, param_dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Random parameters: normal(0.02) kernels and embeddings, zero biases, unit norm scales."""
    make = family_of(config).module
    model = make(config, dtype=param_dtype, param_dtype=param_dtype, rngs=nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.state(model))


def bind(config: Any, params: Params, dtype: DTypeLike, *, dense: bool = False) -> Any:
    """The family's module with these parameters, computing in `dtype`.

    dense: they are arrays, none in 4 bits nor with an adapter, so that `products.in_pieces` can
    split the linear layers' weights.
    """
    graphdef, _ = _abstract(config, np.dtype(dtype), np.dtype(jnp.float32), dense)
    return nnx.merge(graphdef, params)


def apply_hidden(
    config: Any,
    params: Params,
    input_ids: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    cache: Cache | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    dense: bool = False,
) -> tuple[jax.Array, Cache | None, jax.Array | None]:
    """A decoder's hidden states after the final norm.

    input_ids       [B, T] int
    attention_mask  [B, T], zero on padding (left or right). Without a cache it may be None: no
                    padding, and no mask array is built unless a sliding window needs one.
    segment_ids     [B, T] int: the document that a token is of, where several are packed in a row,
                    each with a number of its own. A token sees its own document only, and positions
                    start anew in each. Not together with a cache.
    positions       [B, T]; None counts the real tokens of each row, or of each document.
    cache           None, or the `Cache` to extend by these T tokens. The caller provides the room:
                    inside jit an overflow cannot be detected.
    dtype           of the computation; norms, softmax and rotation are fp32 throughout.
    remat           what the backward pass keeps of each layer: see `remat.RematPolicy`
    dense           as for `bind`

    Returns hidden [B, T, D], the extended cache (None if none was given), and what is to be added
    to the mean loss of the tokens in training, fp32 [] (None for most models: nothing).
    """
    return bind(config, params, dtype, dense=dense).hidden(
        input_ids,
        attention_mask=attention_mask,
        segment_ids=segment_ids,
        positions=positions,
        cache=cache,
        remat=remat,
    )


def apply_head(
    config: Any,
    params: Params,
    hidden: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    dense: bool = False,
) -> jax.Array:
    """Logits, fp32 [..., V], of hidden states [..., D]; uses only the head's parameters.

    dense: the head's weight is an array, neither in 4 bits nor with an adapter. Its gradient then
    multiplies in `dtype`; in forward mode it has none.
    """
    return bind(config, params, dtype).head(hidden.astype(dtype), dense=dense)


def apply(
    config: Any,
    params: Params,
    input_ids: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    **settings: Any,
) -> tuple[jax.Array, Cache | None]:
    """Logits, fp32 [B, T, V], and the extended cache; arguments as for `apply_hidden`."""
    hidden, cache, _ = apply_hidden(config, params, input_ids, dtype=dtype, **settings)
    return apply_head(config, params, hidden, dtype=dtype), cache
