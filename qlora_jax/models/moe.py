"""Decoders whose MLPs are mixtures of experts: Mixtral and Qwen3-MoE."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
from qlora_jax.models import llama
from qlora_jax.models.attention import Attention
from qlora_jax.models.config import (
    FULL,
    SLIDING,
    DecoderConfig,
    check_positive,
    only,
    required,
    shared_to_hf,
    special_tokens,
)
from qlora_jax.models.decoder import Decoder, PreNormLayer, Rotation
from qlora_jax.models.experts import SparseMLP
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.remat import cheap, named
from qlora_jax.models.rope import RopeConfig, rotation
from qlora_jax.models.typed import entry

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
    "layers/mlp/router": "model.layers.{}.mlp.gate",
    "layers/mlp/experts": "model.layers.{}.mlp.experts.{}",
}
"""Our module -> Hugging Face's, {} being the numbers of the layer and of the expert."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(DecoderConfig):
    """A decoder with experts in every layer. Field names follow config.json where it has them.

    num_experts is Mixtral's num_local_experts, moe_intermediate_size its intermediate_size: the
    hidden size of one expert. norm_topk_prob: the weights of a token's experts sum to one.
    attention_bias: of all four projections; qk_norm: queries and keys are normalized.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    rms_norm_eps: float
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("num_experts", "num_experts_per_tok", "moe_intermediate_size"))
        if self.num_experts_per_tok > self.num_experts:
            raise QloraError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but there are "
                f"{self.num_experts} experts"
            )
        if self.head_dim % 2:
            raise QloraError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "MoeConfig":
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
        _check_sparse(hf)
        # transformers has called it both, from version to version.
        experts = entry(hf, "num_experts", int, entry(hf, "num_local_experts", int))
        if experts is None:
            raise QloraError(f"config.json of a {hf['model_type']} model lacks num_experts")
        window = entry(hf, "sliding_window", int, None if mixtral else 4096)
        if not mixtral and not entry(hf, "use_sliding_window", bool, False):
            window = None
        usual_theta = {"rope_theta": 1e6} if mixtral else {}
        return cls(
            model_type=hf["model_type"],
            moe_intermediate_size=sizes.pop(expert_size),
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
            attention_bias=not mixtral and entry(hf, "attention_bias", bool, False),
            qk_norm=not mixtral,
            tie_word_embeddings=entry(hf, "tie_word_embeddings", bool, False),
            **special_tokens(hf),
        )

    def to_hf(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            **shared_to_hf(self),
            "architectures": [ARCHITECTURES[self.model_type]],
            "intermediate_size": self.moe_intermediate_size,
            "hidden_act": "silu",
            "num_experts_per_tok": self.num_experts_per_tok,
            "sliding_window": self.sliding_window,
            "rms_norm_eps": self.rms_norm_eps,
            **self.rope.entries_to_hf(),
        }
        if self.model_type == "mixtral":
            return out | {"num_local_experts": self.num_experts}
        return out | {
            "num_experts": self.num_experts,
            "moe_intermediate_size": self.moe_intermediate_size,
            "norm_topk_prob": self.norm_topk_prob,
            "attention_bias": self.attention_bias,
            "use_sliding_window": self.sliding_window is not None,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }


def _check_sparse(hf: Mapping[str, Any]) -> None:
    """Raises QloraError for what would make other layers, or another loss, than is computed."""
    step, dense = entry(hf, "decoder_sparse_step", int, 1), entry(hf, "mlp_only_layers", list, [])
    if step != 1 or dense:
        raise QloraError(
            f"decoder_sparse_step {step} and mlp_only_layers {dense} mean layers without experts; "
            "only models with experts in every layer are supported"
        )
    if entry(hf, "output_router_logits", bool, False):
        raise QloraError(
            "output_router_logits true adds a load-balancing loss in training, which is not "
            "supported; set it to false in config.json to train without it"
        )
    if noise := entry(hf, "router_jitter_noise", float, 0.0):
        raise QloraError(
            f"router_jitter_noise {noise} changes training and is not supported; set it to 0 in "
            "config.json to train without it"
        )


class MoeLayer(PreNormLayer):
    """One decoder layer, normalized before attention and before the experts."""

    def __init__(
        self, config: MoeConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        head_norm = functools.partial(RMSNorm, config.head_dim, config.rms_norm_eps)
        self.self_attn = Attention(
            config,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            qk_norm=head_norm if config.qk_norm else None,
            **options,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMLP(
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


class Moe(Decoder):
    """The whole decoder; see `Decoder`."""

    def __init__(
        self, config: MoeConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        norm = functools.partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        super().__init__(config, MoeLayer, norm, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def rotations(self, positions: jax.Array) -> Sequence[Rotation]:
        config = self.config
        return (rotation(config.rope, config.head_dim, config.max_position_embeddings, positions),)
