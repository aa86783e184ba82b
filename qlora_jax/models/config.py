"""What a Llama-family model is made of, read from (and written to) Hugging Face's config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import QloraError
from qlora_jax.models.typed import checked, entry, needed

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FULL, SLIDING = "full_attention", "sliding_attention"
_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base and, for long contexts, how its frequencies are rescaled.

    Field names are those of config.json. `None` means "not given"; `kind` decides which are used.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta` (before)."""
        key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
        given = dict(entry(hf, key, Mapping, {}))
        kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
        given.pop("type", None)
        theta = entry(hf, "rope_theta", float) or 10000.0
        theta = entry(given, "rope_theta", float) or theta
        partial = given.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
        for name in ("rope_theta", "partial_rotary_factor"):
            given.pop(name, None)
        if partial != 1.0:
            raise QloraError(f"partial_rotary_factor {partial} is not supported; only 1.0 is")
        if kind not in _ROPE_KINDS:
            raise QloraError(f"rope scaling {kind!r} is not supported; known: {_ROPE_KINDS}")
        known = {field.name for field in dataclasses.fields(cls)} - {"kind", "theta"}
        unknown = sorted(set(given) - known)
        if unknown:
            raise QloraError(f"rope scaling {kind!r} has settings we do not know: {unknown}")
        missing = [key for key in _ROPE_REQUIRED.get(kind, ()) if given.get(key) is None]
        if missing:
            raise QloraError(f"rope scaling {kind!r} lacks {missing}")
        if kind in ("llama3", "yarn") and given.get("original_max_position_embeddings") is None:
            given["original_max_position_embeddings"] = hf.get(
                "original_max_position_embeddings", hf.get("max_position_embeddings", 2048)
            )
        kinds = {"original_max_position_embeddings": int, "truncate": bool}
        settings = {
            name: checked(f"{key}.{name}", value, kinds.get(name, float))
            for name, value in given.items()
            if value is not None
        }
        return cls(kind=kind, theta=theta, **settings)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` entry of config.json."""
        fields = dataclasses.asdict(self)
        out: dict[str, Any] = {"rope_type": fields.pop("kind"), "rope_theta": fields.pop("theta")}
        if self.kind != "yarn":
            fields.pop("truncate")
        return out | {key: value for key, value in fields.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A Llama-family decoder. Field names follow config.json where it has them.

    qkv_bias, o_bias, mlp_bias, qk_norm spell out what in Hugging Face depends on the family.
    layer_types holds one of "full_attention" and "sliding_attention" for every layer.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    sliding_window: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise QloraError(f"{name} is {getattr(self, name)}, expected at least 1")
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
        if self.head_dim % 2:
            raise QloraError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a config.json. Raises QloraError for a family or a switch that is not supported."""
        family = hf.get("model_type")
        if family not in FAMILIES:
            raise QloraError(
                f"model_type {family!r} is not supported; known families: {', '.join(FAMILIES)}"
            )
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        missing = [key for key in required if hf.get(key) is None]
        if missing:
            raise QloraError(f"config.json of a {family} model lacks {missing}")
        if hf.get("hidden_act", "silu") != "silu":
            raise QloraError(f"hidden_act {hf['hidden_act']!r} is not supported; only 'silu' is")
        if quantized := entry(hf, "quantization_config", Mapping):
            method = quantized.get("quant_method")
            raise QloraError(f"the checkpoint is already quantized ({method}); give a dense one")
        sizes = {key: needed(hf, key, int) for key in required}
        heads, layers = sizes["num_attention_heads"], sizes["num_hidden_layers"]
        head_dim = entry(hf, "head_dim", int)
        if head_dim is None:
            head_dim = 128 if family == "qwen3" else sizes["hidden_size"] // max(heads, 1)
        window, layer_types = _windows(family, hf, layers)
        attention_bias = entry(hf, "attention_bias", bool, False) and family in ("llama", "qwen3")
        usual_kv_heads = 8 if family == "mistral" and "num_key_value_heads" not in hf else heads
        return cls(
            **sizes,
            model_type=family,
            num_key_value_heads=entry(hf, "num_key_value_heads", int, usual_kv_heads),
            head_dim=head_dim,
            layer_types=layer_types,
            sliding_window=window,
            max_position_embeddings=entry(hf, "max_position_embeddings", int, 2048),
            rms_norm_eps=entry(hf, "rms_norm_eps", float, 1e-6),
            rope=RopeConfig.from_hf(hf),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=entry(hf, "mlp_bias", bool, False) and family == "llama",
            qk_norm=family == "qwen3",
            tie_word_embeddings=entry(hf, "tie_word_embeddings", bool, False),
            bos_token_id=entry(hf, "bos_token_id", int),
            eos_token_id=_end_tokens(hf),
            pad_token_id=entry(hf, "pad_token_id", int),
        )

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers (4 and 5) reads back to the same model."""
        rope = self.rope.to_hf()
        eos: Any = list(self.eos_token_id) if len(self.eos_token_id) > 1 else None
        if len(self.eos_token_id) == 1:
            eos = self.eos_token_id[0]
        out: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
        }
        if self.rope.kind != "default":
            out["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        if self.model_type in ("llama", "qwen3"):
            out["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            out["mlp_bias"] = self.mlp_bias
        if self.model_type in ("mistral", "qwen2", "qwen3"):
            out["sliding_window"] = self.sliding_window
        if self.model_type in ("qwen2", "qwen3"):
            out["use_sliding_window"] = self.sliding_window is not None
            out["layer_types"] = list(self.layer_types)
        return out


def _windows(family: str, hf: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[str, ...]]:
    """The window and which layers use it: all of Mistral, the upper ones of Qwen, none of Llama."""
    if family == "llama":
        return None, (FULL,) * layers
    # No entry means 4096 to transformers, null means no window.
    window = entry(hf, "sliding_window", int, None if "sliding_window" in hf else 4096)
    if family == "mistral":
        return window, ((SLIDING if window else FULL),) * layers
    if not entry(hf, "use_sliding_window", bool, False):
        window = None
    types = entry(hf, "layer_types", list)
    if types is None:
        first = entry(hf, "max_window_layers", int, 28)
        types = [SLIDING if window and i >= first else FULL for i in range(layers)]
    return window, tuple(checked("layer_types", kind, str) for kind in types)


def _end_tokens(hf: Mapping[str, Any]) -> tuple[int, ...]:
    ends = hf.get("eos_token_id")
    if ends is None:
        return ()
    ends = ends if isinstance(ends, list) else [ends]
    return tuple(checked("eos_token_id", end, int) for end in ends)
