"""Decoders whose MLPs are mixtures of experts: Mixtral and Qwen3-MoE."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
from qlora_jax.models import llama
from qlora_jax.models.config import (
    FULL,
    SLIDING,
    check_positive,
    only,
    required,
    shared_to_hf,
    special_tokens,
)
from qlora_jax.models.experts import SparseMLP, load_balancing_loss
from qlora_jax.models.remat import cheap, named
from qlora_jax.models.rope import RopeConfig
from qlora_jax.models.stacks import stack
from qlora_jax.models.typed import checked, entry

ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
"""What transformers calls the families, by their model_type."""

_MIXTRAL = "model.layers.{}.block_sparse_moe"
MIXTRAL_NAMES = {
    **llama.NAMES,
    "layers/mlp/router": f"{_MIXTRAL}.gate",
    "layers/mlp/experts/gate_proj": f"{_MIXTRAL}.experts.{{}}.w1",
    "layers/mlp/experts/up_proj": f"{_MIXTRAL}.experts.{{}}.w3",
    "layers/mlp/experts/down_proj": f"{_MIXTRAL}.experts.{{}}.w2",
}
QWEN3_MOE_NAMES = {
    **llama.NAMES,
    "dense_layers": "model.layers.{}",
    "layers/mlp/router": "model.layers.{}.mlp.gate",
    "layers/mlp/experts": "model.layers.{}.mlp.experts.{}",
}
"""Our module -> Hugging Face's, {} being the numbers of the layer and of the expert."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(llama.LlamaConfig):
    """A decoder with experts in (nearly) every layer. Names follow config.json where it has them.

    num_experts is Mixtral's num_local_experts, moe_intermediate_size its intermediate_size: the
    hidden size of one expert. norm_topk_prob: the weights of a token's experts sum to one.
    dense_layers: the numbers of the layers that have a plain MLP instead, of intermediate_size.
    output_router_logits: in training the experts' load is to be balanced, by a loss that counts
    router_aux_loss_coef times.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    dense_layers: tuple[int, ...] = ()
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("num_experts", "num_experts_per_tok", "moe_intermediate_size"))
        if self.num_experts_per_tok > self.num_experts:
            raise QloraError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but there are "
                f"{self.num_experts} experts"
            )
        if not self.stacks["layers"]:
            raise QloraError("no layer has experts, which makes the model a dense one: qwen3")

    @property
    def padding_matters(self) -> bool:
        return self.output_router_logits

    @property
    def stacks(self) -> Mapping[str, Sequence[int]]:
        dense = set(self.dense_layers)
        sparse = [i for i in range(self.num_hidden_layers) if i not in dense]
        return {"layers": sparse} | ({"dense_layers": sorted(dense)} if dense else {})

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        mixtral = hf["model_type"] == "mixtral"
        expert_size = "intermediate_size" if mixtral else "moe_intermediate_size"
        sizes = required(
            hf,
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_experts_per_tok",
            expert_size,
        )
        only(hf, hidden_act="silu")
        # transformers has called it both, from version to version.
        experts = entry(hf, "num_experts", int, entry(hf, "num_local_experts", int))
        if experts is None:
            raise QloraError(f"config.json of a {hf['model_type']} model lacks num_experts")
        window = entry(hf, "sliding_window", int, None if mixtral else 4096)
        if not mixtral and not entry(hf, "use_sliding_window", bool, False):
            window = None
        usual_theta = {"rope_theta": 1e6} if mixtral else {}
        hidden = sizes.pop(expert_size)
        attention_bias = not mixtral and entry(hf, "attention_bias", bool, False)
        return cls(
            model_type=hf["model_type"],
            moe_intermediate_size=hidden,
            intermediate_size=hidden if mixtral else entry(hf, "intermediate_size", int, 6144),
            **sizes,
            num_key_value_heads=entry(hf, "num_key_value_heads", int, 8 if mixtral else 4),
            head_dim=entry(hf, "head_dim", int)
            or sizes["hidden_size"] // max(sizes["num_attention_heads"], 1),
            layer_types=((SLIDING if window else FULL),) * sizes["num_hidden_layers"],
            sliding_window=window,
            num_experts=experts,
            norm_topk_prob=mixtral or entry(hf, "norm_topk_prob", bool, False),
            max_position_embeddings=entry(
                hf, "max_position_embeddings", int, 131072 if mixtral else 32768
            ),
            rms_norm_eps=entry(hf, "rms_norm_eps", float, 1e-5 if mixtral else 1e-6),
            rope=RopeConfig.from_hf(usual_theta | dict(hf)),
            qkv_bias=attention_bias,
            o_bias=attention_bias,
            qk_norm=not mixtral,
            dense_layers=() if mixtral else _dense_layers(hf, sizes["num_hidden_layers"]),
            output_router_logits=entry(hf, "output_router_logits", bool, False),
            router_aux_loss_coef=entry(hf, "router_aux_loss_coef", float, 0.001),
            tie_word_embeddings=entry(hf, "tie_word_embeddings", bool, False),
            **special_tokens(hf),
        )

    def to_hf(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            **shared_to_hf(self),
            "architectures": [ARCHITECTURES[self.model_type]],
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "num_experts_per_tok": self.num_experts_per_tok,
            "sliding_window": self.sliding_window,
            "rms_norm_eps": self.rms_norm_eps,
            "output_router_logits": self.output_router_logits,
            "router_aux_loss_coef": self.router_aux_loss_coef,
            **self.rope.entries_to_hf(),
        }
        if self.model_type == "mixtral":
            return out | {"num_local_experts": self.num_experts}
        return out | {
            "num_experts": self.num_experts,
            "moe_intermediate_size": self.moe_intermediate_size,
            "norm_topk_prob": self.norm_topk_prob,
            "attention_bias": self.qkv_bias,
            "use_sliding_window": self.sliding_window is not None,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(self.dense_layers),
        }


def _dense_layers(hf: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Numbers of the layers without experts: those listed, and all but every `step`-th."""
    step, listed = entry(hf, "decoder_sparse_step", int, 1), entry(hf, "mlp_only_layers", list, [])
    if step < 1:
        raise QloraError(f"decoder_sparse_step is {step}, expected at least 1")
    dense = {checked("mlp_only_layers", number, int) for number in listed}
    return tuple(i for i in range(layers) if i in dense or (i + 1) % step)


class MoeLayer(llama.Layer):
    """One decoder layer, normalized before attention and before the experts."""

    def make_mlp(self, config: MoeConfig, **options: Any) -> nnx.Module:
        return SparseMLP(
            width=config.hidden_size,
            hidden=config.moe_intermediate_size,
            experts=config.num_experts,
            chosen=config.num_experts_per_tok,
            renormalize=config.norm_topk_prob,
            **options,
        )

    def feed_forward(self, x: jax.Array) -> jax.Array:
        norm = self.post_attention_layernorm
        routing = cheap(lambda x: self.mlp.route(norm(x)))(x)
        widen = cheap(lambda x, routing: self.mlp.widen(norm(x), routing))
        gate, up = named("wide", widen(x, routing))
        return x + cheap(self.mlp.narrow)(gate, up, routing)

    def load(self, x: jax.Array, real: jax.Array | None) -> jax.Array:
        """The experts' load [2, E] by x [B, T, D]; see `SparseMLP.load`."""
        return cheap(lambda x: self.mlp.load(self.post_attention_layernorm(x), real))(x)


class Moe(llama.Llama):
    """The whole decoder; see `Decoder`. Layers without experts are the stack `dense_layers`."""

    layer = MoeLayer
    config: MoeConfig

    def __init__(
        self, config: MoeConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(config, **options, rngs=rngs)

        def dense(rngs: nnx.Rngs) -> llama.Layer:
            return llama.Layer(config, **options, rngs=rngs)

        if config.dense_layers:
            self.dense_layers = stack(dense, len(config.dense_layers), rngs)

    def measure(self, layer: Any, x: jax.Array, real: jax.Array | None) -> jax.Array | None:
        """The load of a layer's experts, if it is to be balanced."""
        wanted = self.config.output_router_logits and isinstance(layer, MoeLayer)
        return layer.load(x, real) if wanted else None

    def extra_loss(self, measured: Sequence[Any]) -> jax.Array | None:
        loads = [jnp.sum(load, axis=0) for load in measured if load is not None]
        if not loads:
            return None
        balance = load_balancing_loss(
            jnp.sum(jnp.stack(loads), axis=0), self.config.num_experts_per_tok
        )
        return self.config.router_aux_loss_coef * balance
