"""The Llama family: Llama 1 to 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3.

`Llama` is an ordinary Flax module whose layers are stacked on a leading axis and scanned. The
functions below it take the parameters as a nested dict of arrays, which is what the rest of the
library (and `jax.grad`) works with. Letters: B batch, T time, S cache slots, D model, V vocabulary.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike

from qlora_jax.models.attention import Attention, causal_mask, within_window
from qlora_jax.models.cache import Cache
from qlora_jax.models.config import FULL, LlamaConfig
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.rope import rotation

Params = Mapping[str, Any]


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        linear = functools.partial(
            nnx.Linear,
            use_bias=config.mlp_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def widen(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D] -> gate and up, [B, T, F]."""
        return self.gate_proj(x), self.up_proj(x)

    def narrow(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """gate and up [B, T, F] -> [B, T, D]."""
        return self.down_proj(jax.nn.silu(gate) * up)


# Marks where the backward pass starts from the inputs again. What lies between two such places is
# a norm or a gate before matrix products; of those no output is needed again but what the next
# place keeps, so they are not repeated. Of all [B, T, F] arrays gate and up alone are kept.
_cheap = functools.partial(jax.checkpoint, prevent_cse=False)


class Layer(nnx.Module):
    """One decoder layer, normalized before attention and before the MLP."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, **options)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, **options)


class Llama(nnx.Module):
    """The whole decoder. `nnx.state` of it is the parameter tree, layers stacked as [L, ...]."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        init = nnx.initializers.normal(0.02)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, **options, rngs=rngs)

        self.config = config
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=init, **options, rngs=rngs
        )
        self.layers = stacked(rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                kernel_init=init,
                preferred_element_type=jnp.float32,
                **options,
                rngs=rngs,
            )

    def hidden(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """Final, normalized hidden states [B, T, D]; see `apply_hidden`."""
        config, (batch, time) = self.config, input_ids.shape
        start = jnp.zeros((), jnp.int32) if cache is None else cache.index
        valid = None if attention_mask is None else attention_mask.astype(bool)
        if positions is None:
            positions = _positions(valid, batch, time)
            if cache is not None:
                positions = positions + cache.positions[:, None]
        cos, sin = rotation(config, positions)

        queries = start + jnp.arange(time)
        slots = time if cache is None else cache.length
        if cache is not None:
            _check_room(cache, batch, time)
            new = jnp.ones((batch, time), bool) if valid is None else valid
            valid = jax.lax.dynamic_update_slice(cache.valid, new, (0, start))
        windows = _layer_windows(config, slots)
        mask = None
        if valid is not None or windows is not None:
            mask = causal_mask(queries, slots, valid)

        graphdef, stacked = nnx.split(self.layers)

        def layer_step(carry: Any, xs: Any) -> tuple[Any, None]:
            x, keys, values = carry
            state, number, window = xs
            layer = nnx.merge(graphdef, state)
            q, k, v = _cheap(lambda x: layer.self_attn.project(layer.input_layernorm(x), cos, sin))(
                x
            )
            if cache is not None:
                place = (number, 0, start, 0, 0)
                keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), place)
                values = jax.lax.dynamic_update_slice(values, v[None].astype(keys.dtype), place)
                k, v = keys[number].astype(q.dtype), values[number].astype(q.dtype)
            here = mask
            if mask is not None and window is not None:
                here = mask & within_window(queries, slots, window)
            x = x + layer.self_attn.attend(q, k, v, here)
            gate, up = _cheap(lambda x: layer.mlp.widen(layer.post_attention_layernorm(x)))(x)
            x = x + _cheap(layer.mlp.narrow)(gate, up)
            return (x, keys, values), None

        # The cache travels in the carry, where XLA updates it in place; as scan inputs and outputs
        # it would be copied whole at every token.
        step = jax.checkpoint(layer_step, prevent_cse=False) if remat else layer_step
        carry = (
            self.embed_tokens(input_ids),
            *((None, None) if cache is None else (cache.k, cache.v)),
        )
        numbers = jnp.arange(config.num_hidden_layers)
        (x, keys, values), _ = jax.lax.scan(step, carry, (stacked, numbers, windows))
        if cache is not None and valid is not None:
            cache = Cache(
                k=keys,
                v=values,
                valid=valid,
                positions=positions[:, -1] + 1,
                index=start + time,
            )
        return self.norm(x), cache

    def head(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits [..., V], accumulated and returned in fp32."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        table = self.embed_tokens.embedding[...].astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def _positions(real: jax.Array | None, batch: int, time: int) -> jax.Array:
    """[B, T]: counts real tokens only, so that left padding does not shift a sequence."""
    if real is None:
        return jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
    return jnp.maximum(jnp.cumsum(real.astype(jnp.int32), axis=1) - 1, 0)


def _layer_windows(config: LlamaConfig, slots: int) -> jax.Array | None:
    """Sliding window of every layer, [L], or None where none can hide one of `slots` slots."""
    if config.sliding_window is None or slots <= config.sliding_window:
        return None
    unlimited = np.iinfo(np.int32).max
    sizes = [unlimited if t == FULL else config.sliding_window for t in config.layer_types]
    return jnp.asarray(sizes, jnp.int32)


def _check_room(cache: Cache, batch: int, time: int) -> None:
    if cache.valid.shape[0] != batch:
        raise ValueError(f"the cache holds {cache.valid.shape[0]} sequences, got {batch}")
    used = 0 if isinstance(cache.index, Tracer) else int(cache.index)
    if used + time > cache.length:
        raise ValueError(
            f"the cache has {cache.length} slots, {used} in use: no room for {time} tokens more"
        )


@functools.cache
def _abstract(config: LlamaConfig, dtype: np.dtype, param_dtype: np.dtype) -> tuple[Any, Any]:
    """The module's structure and its parameters as shapes; nothing is allocated."""
    model = nnx.eval_shape(
        lambda: Llama(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )
    return nnx.split(model)


def abstract_params(config: LlamaConfig, param_dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """The parameter tree as ShapeDtypeStructs (norm scales are fp32 whatever `param_dtype`)."""
    dtype = np.dtype(param_dtype)
    return nnx.to_pure_dict(_abstract(config, dtype, dtype)[1])


def init_params(
    config: LlamaConfig, key: jax.Array, param_dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Random parameters: normal(0.02) kernels and embeddings, zero biases, unit norm scales."""
    model = Llama(config, param_dtype=param_dtype, rngs=nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.state(model))


def _bind(config: LlamaConfig, params: Params, dtype: DTypeLike) -> Llama:
    graphdef, _ = _abstract(config, np.dtype(dtype), np.dtype(jnp.float32))
    return nnx.merge(graphdef, params)


def apply_hidden(
    config: LlamaConfig,
    params: Params,
    input_ids: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    cache: Cache | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> tuple[jax.Array, Cache | None]:
    """Hidden states after the final norm.

    input_ids       [B, T] int
    attention_mask  [B, T], zero on padding (left or right). Without a cache it may be None: no
                    padding, and no mask array is built unless a sliding window needs one.
    positions       [B, T] rotary positions; None counts the real tokens of each row.
    cache           None, or the `Cache` to extend by these T tokens. The caller provides the room:
                    inside jit an overflow cannot be detected.
    dtype           of the computation; norms, softmax and rotation are fp32 throughout.
    remat           keep only each layer's input for the backward pass and compute it again.

    Returns hidden [B, T, D] and the extended cache (None if none was given).
    """
    model = _bind(config, params, dtype)
    return model.hidden(
        input_ids, attention_mask=attention_mask, positions=positions, cache=cache, remat=remat
    )


def apply_head(
    config: LlamaConfig, params: Params, hidden: jax.Array, *, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Logits, fp32 [..., V], of hidden states [..., D]; uses only the head's parameters."""
    return _bind(config, params, dtype).head(hidden.astype(dtype))


def apply(
    config: LlamaConfig,
    params: Params,
    input_ids: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    cache: Cache | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> tuple[jax.Array, Cache | None]:
    """Logits, fp32 [B, T, V], and the extended cache; arguments as for `apply_hidden`."""
    hidden, cache = apply_hidden(
        config,
        params,
        input_ids,
        attention_mask=attention_mask,
        positions=positions,
        cache=cache,
        dtype=dtype,
        remat=remat,
    )
    return apply_head(config, params, hidden, dtype=dtype), cache
