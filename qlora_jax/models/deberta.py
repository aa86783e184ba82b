"""DeBERTa-v2 and v3: attention that adds to each score what content and distance say together.

Disentangled attention (arXiv:2006.03654), log buckets of distances, a convolution after the first
layer (v2). Letters as in `encoder`, and S = 2 x span rows of relative embeddings.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
from qlora_jax.models.classification import SOFT_LABELS
from qlora_jax.models.dot_product import dot_product_attention
from qlora_jax.models.encoder import Embeddings, Stack, check_length, linear, visible
from qlora_jax.models.encoder_config import (
    ACTIVATIONS,
    CLASSIFICATION,
    MASKED_LM,
    EncoderConfig,
    read_common,
    write_common,
)
from qlora_jax.models.heads import MaskedLMHead, Pooler, classifier
from qlora_jax.models.norm import LayerNorm
from qlora_jax.models.positions import count_positions
from qlora_jax.models.remat import Remat, cheap, named
from qlora_jax.models.typed import checked, entry

NAMES = {
    "embeddings": "deberta.embeddings",
    "encoder": "deberta.encoder",
    "encoder/layer": "deberta.encoder.layer.{}",
    "pooler": "pooler",
    "lm_head": "cls.predictions",
    "lm_head/dense": "cls.predictions.transform.dense",
    "lm_head/LayerNorm": "cls.predictions.transform.LayerNorm",
    "lm_predictions": "lm_predictions",
    "classifier": "classifier",
}
"""Our module -> Hugging Face's, {} being the layer's number; what is inside has the same names."""

C2P, P2C = "c2p", "p2c"
_NORMS = ("none", "layer_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaConfig(EncoderConfig):
    """DeBERTa-v2 or v3. Field names follow config.json.

    relative_attention      whether scores depend on distances at all
    pos_att_type            which do: "c2p" (query's content, key's distance), "p2c" (the reverse)
    share_att_key           distances are projected by the layer's own query and key projections
    position_buckets        buckets for distances to one side, exact when near, logarithmic when
                            far; -1: none, every distance up to max_relative_positions for itself
    norm_rel_ebd            "layer_norm": relative embeddings are normalized
    position_biased_input   whether absolute positions are added to the input
    embedding_size          width of the tables
    conv_kernel_size        0: no convolution
    legacy                  whether the masked-lm head is the one of transformers' first version
    """

    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    relative_attention: bool = False
    pos_att_type: tuple[str, ...] = ()
    share_att_key: bool = False
    max_relative_positions: int = -1
    position_buckets: int = -1
    norm_rel_ebd: str = "none"
    position_biased_input: bool = True
    embedding_size: int
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    conv_groups: int = 1
    pooler_hidden_act: str = "gelu"
    legacy: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.pos_att_type) - {C2P, P2C})
        if unknown:
            raise QloraError(f"pos_att_type {unknown} is not supported; known: {[C2P, P2C]}")
        if self.norm_rel_ebd not in _NORMS:
            raise QloraError(f"norm_rel_ebd {self.norm_rel_ebd!r} is not supported: {_NORMS} are")
        if self.conv_kernel_size and self.conv_kernel_size % 2 == 0:
            raise QloraError(f"conv_kernel_size is {self.conv_kernel_size}, expected an odd number")
        if self.conv_groups < 1 or self.hidden_size % self.conv_groups:
            raise QloraError(
                f"hidden_size {self.hidden_size} is not a multiple of conv_groups "
                f"{self.conv_groups}"
            )
        if self.head == MASKED_LM and not self.legacy and self.embedding_size != self.hidden_size:
            raise QloraError(
                f"embedding_size {self.embedding_size} is not hidden_size {self.hidden_size}, "
                "as the masked-lm head (legacy: false) needs"
            )
        for field in ("conv_act", "pooler_hidden_act"):
            self.check_activation(field)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "DebertaConfig":
        """Reads a config.json. Raises QloraError for a switch that is not supported."""
        common = read_common(hf, type_vocab_size=0, layer_norm_eps=1e-7, pad_token_id=0)
        width, heads = common["hidden_size"], common["num_attention_heads"]
        for key, size in (
            ("attention_head_size", width // max(heads, 1)),
            ("pooler_hidden_size", width),
        ):
            if entry(hf, key, int, size) != size:
                raise QloraError(f"{key} {hf[key]} is not supported; here it must be {size}")
        kinds: dict[str, type] = {
            "relative_attention": bool,
            "share_att_key": bool,
            "max_relative_positions": int,
            "position_buckets": int,
            "norm_rel_ebd": str,
            "position_biased_input": bool,
            "conv_kernel_size": int,
            "conv_act": str,
            "conv_groups": int,
            "pooler_hidden_act": str,
            "legacy": bool,
        }
        given = {key: entry(hf, key, kind) for key, kind in kinds.items()}
        return cls(
            **common,
            **{key: value for key, value in given.items() if value is not None},
            embedding_size=entry(hf, "embedding_size", int, width),
            pos_att_type=_kinds(hf),
        )

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers reads back to the same model."""
        own = {field.name for field in dataclasses.fields(DebertaConfig)}
        own -= {field.name for field in dataclasses.fields(EncoderConfig)}
        out = {name: getattr(self, name) for name in own}
        return write_common(self, "DebertaV2") | out | {"pos_att_type": list(self.pos_att_type)}

    def loss_of(self, labels: jax.Array) -> str:
        """As of other encoders, but that labels [B, C] are probabilities if nothing else is set."""
        soft = self.problem_type is None and len(self.labels) > 1
        if soft and labels.ndim == 2 and labels.shape[-1] > 1:
            return SOFT_LABELS
        return super().loss_of(labels)

    @property
    def longest(self) -> int:
        """The distance at which distances stop to be told apart."""
        given = self.max_relative_positions
        return given if given > 0 else self.max_position_embeddings

    @property
    def span(self) -> int:
        """Rows of the relative embeddings to one side; there are 2 x span."""
        return self.position_buckets if self.position_buckets > 0 else self.longest

    @property
    def score_scale(self) -> float:
        """1 / sqrt(Dh x how many terms a score is the sum of)."""
        return 1 / math.sqrt(self.head_dim * (1 + len(set(self.pos_att_type))))


def _kinds(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """pos_att_type, a list or "c2p|p2c"."""
    given = hf.get("pos_att_type") or []
    names = (
        given.lower().split("|") if isinstance(given, str) else checked("pos_att_type", given, list)
    )
    return tuple(checked("pos_att_type", name, str).strip() for name in names)


def relative_rows(config: DebertaConfig, time: int) -> jax.Array:
    """[T, T] int: which row of the relative embeddings stands for query i and key j."""
    distance = np.arange(1 - time, time)
    if config.position_buckets > 0:
        distance = log_buckets(distance, config.position_buckets, config.longest)
    rows = np.clip(distance + config.span, 0, 2 * config.span - 1).astype(np.int32)
    steps = jnp.arange(time)
    return jnp.asarray(rows)[steps[:, None] - steps[None, :] + time - 1]


def log_buckets(distance: np.ndarray, buckets: int, longest: int) -> np.ndarray:
    """Distances up to half the buckets as they are, farther ones by their logarithm, rounded up.

    In fp32, as the checkpoints were trained: at powers of two rounding decides.
    """
    middle = buckets // 2
    far = np.maximum(np.abs(distance), 1).astype(np.float32)
    whole = np.log(np.float32((longest - 1) / middle))
    logarithms = np.log(far / np.float32(middle)) / whole * np.float32(middle - 1)
    bucket = np.ceil(logarithms).astype(np.int64) + middle
    return np.where(np.abs(distance) <= middle, distance, np.sign(distance) * bucket)


class DisentangledAttention(nnx.Module):
    """Attention whose scores are q k^T + q pos_k^T (c2p) + pos_q k^T (p2c), by distance."""

    def __init__(self, config: DebertaConfig, **options: Any) -> None:
        width = config.hidden_size
        self.config = config
        self.query_proj = linear(config, width, width, **options)
        self.key_proj = linear(config, width, width, **options)
        self.value_proj = linear(config, width, width, **options)
        kinds = config.pos_att_type if config.relative_attention else ()
        self.c2p, self.p2c = C2P in kinds, P2C in kinds
        if self.c2p and not config.share_att_key:
            self.pos_key_proj = linear(config, width, width, **options)
        if self.p2c and not config.share_att_key:
            self.pos_query_proj = linear(config, width, width, **options)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        relative: jax.Array | None,
        rows: jax.Array | None,
    ) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; relative [S, D], and rows [T, T] of it for query and key."""
        config = self.config
        q, k, v = (
            _split(project(x), config.head_dim)
            for project in (self.query_proj, self.key_proj, self.value_proj)
        )
        pos_k = pos_q = None
        if self.c2p:
            project = self.key_proj if config.share_att_key else self.pos_key_proj
            assert relative is not None
            pos_k = _split(project(relative), config.head_dim)
        if self.p2c:
            project = self.query_proj if config.share_att_key else self.pos_query_proj
            assert relative is not None
            pos_q = _split(project(relative), config.head_dim)
        q, k, v = named("query", q), named("key", k), named("value", v)
        return _attend(q, k, v, pos_q, pos_k, rows, mask, config.score_scale)


def _split(x: jax.Array, head_dim: int) -> jax.Array:
    """[..., D] -> [..., H, Dh]."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


# Neither the [B, H, T, S] nor the [B, H, T, T] arrays are kept for the backward pass.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=7)
def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pos_q: jax.Array | None,
    pos_k: jax.Array | None,
    rows: jax.Array | None,
    mask: jax.Array | None,
    scale: float,
) -> jax.Array:
    """q, k, v [B, T, H, Dh], pos_q and pos_k [S, H, Dh], rows [T, T] -> [B, T, D]."""
    product = functools.partial(jnp.einsum, "bthd,shd->bhts", preferred_element_type=jnp.float32)
    pick = functools.partial(jnp.take_along_axis, axis=-1, mode="promise_in_bounds")
    bias = None
    if pos_k is not None:
        assert rows is not None
        bias = pick(product(q, pos_k), rows[None, None])
    if pos_q is not None:
        assert rows is not None
        by_key = pick(product(k, pos_q), rows.T[None, None]).swapaxes(-1, -2)
        bias = by_key if bias is None else bias + by_key
    if bias is not None:
        bias = bias * scale
    out = dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale)
    return out.reshape(*out.shape[:2], -1)


class Conv(nnx.Module):
    """A convolution over time, kernel [K, D / groups, D], as torch's Conv1d with equal padding."""

    def __init__(
        self, config: DebertaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.size, self.groups, self.dtype = config.conv_kernel_size, config.conv_groups, dtype
        shape = (self.size, config.hidden_size // self.groups, config.hidden_size)
        init = nnx.initializers.normal(config.initializer_range)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(shape[-1:], param_dtype))

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; a token of another segment counts as zero."""
        batch, time, width = x.shape
        near = _windows(x, self.size)
        if segment_ids is not None:
            same = _windows(segment_ids, self.size) == segment_ids[..., None]
            near = near * same[..., None].astype(x.dtype)
        near = near.reshape(batch, time, self.size, self.groups, -1)
        kernel = self.kernel[...].astype(self.dtype)
        kernel = kernel.reshape(self.size, -1, self.groups, width // self.groups)
        out = jnp.einsum("btkgi,kigo->btgo", near, kernel).reshape(x.shape)
        return out + self.bias[...].astype(self.dtype)


def _windows(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [B, T, size, ...]: each step with its neighbours, zeros beyond the ends."""
    reach, time = size // 2, x.shape[1]
    padded = jnp.pad(x, ((0, 0), (reach, reach), *[(0, 0)] * (x.ndim - 2)))
    return jnp.stack([padded[:, i : i + time] for i in range(size)], axis=2)


class Convolution(nnx.Module):
    """LayerNorm(out + act(conv(x))): what neighbours say, added after the first layer."""

    def __init__(self, config: DebertaConfig, **options: Any) -> None:
        self.act = ACTIVATIONS[config.conv_act]
        self.conv = Conv(config, **options)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(
        self, x: jax.Array, out: jax.Array, real: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        """x and out [B, T, D], the layer's input and output; real [B, T, 1] is zero on padding."""
        return self.LayerNorm(out + self.act(self.conv(x, segment_ids) * real)) * real


class DebertaStack(Stack):
    """The layers, and what they share: relative embeddings and the convolution."""

    def __init__(self, config: DebertaConfig, **options: Any) -> None:
        super().__init__(config, DisentangledAttention, **options)
        self.config = config
        if config.relative_attention:
            init = nnx.initializers.normal(config.initializer_range)
            self.rel_embeddings = nnx.Embed(
                2 * config.span, config.hidden_size, embedding_init=init, **options
            )
        if config.norm_rel_ebd == "layer_norm":
            self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        if config.conv_kernel_size:
            self.conv = Convolution(config, **options)

    def run(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        real: jax.Array,
        segment_ids: jax.Array | None,
        remat: Remat,
    ) -> jax.Array:
        """x [B, T, D] through all layers; real [B, T, 1] is zero on padding."""
        relative = rows = None
        if self.config.relative_attention:
            # Looked up row by row, so that the table may be any kind of weight.
            relative = self.rel_embeddings(jnp.arange(2 * self.config.span))
            rows = relative_rows(self.config, x.shape[1])
            if self.config.norm_rel_ebd == "layer_norm":
                relative = self.LayerNorm(relative)

        # One program for all layers, in which the first one takes another turn at its end.
        @cheap
        def convolve(number: jax.Array, x: jax.Array, out: jax.Array) -> jax.Array:
            return jax.lax.cond(
                number == 0, lambda: self.conv(x, out, real, segment_ids), lambda: out
            )

        after = convolve if self.config.conv_kernel_size else None
        return self(x, mask, relative, rows, remat=remat, after=after)


class _LMPredictions(nnx.Module):
    """The masked-lm head of `legacy: false`, one module deeper in files."""

    def __init__(self, config: DebertaConfig, **options: Any) -> None:
        self.lm_head = MaskedLMHead(config, config.hidden_size, config.hidden_act, **options)


class Deberta(nnx.Module):
    """The whole encoder and its head."""

    def __init__(
        self,
        config: DebertaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.embeddings = Embeddings(
            config, config.embedding_size, config.position_biased_input, **options
        )
        self.encoder = DebertaStack(config, **options)
        if config.head == MASKED_LM and config.legacy:
            width = config.embedding_size
            self.lm_head = MaskedLMHead(config, width, config.hidden_act, **options)
        elif config.head == MASKED_LM:
            self.lm_predictions = _LMPredictions(config, **options)
        if config.head == CLASSIFICATION:
            self.pooler = Pooler(config, config.pooler_hidden_act, **options)
            self.classifier = classifier(config, **options)

    def hidden(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        remat: Remat = "none",
    ) -> jax.Array:
        """Hidden states [B, T, D] after the last layer; see `EncoderModel.hidden`."""
        config = self.config
        if config.position_biased_input:
            check_length(input_ids.shape[1], config.max_position_embeddings)
        if positions is None:
            positions = count_positions(None, segment_ids, *input_ids.shape)
        x = self.embeddings(input_ids, positions, token_type_ids)
        kept = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        real = kept.astype(bool).astype(x.dtype)[..., None]
        mask = visible(attention_mask, segment_ids)
        if mask is not None:
            # Padding sees nothing at all: it matters to who classifies rows that start with it.
            mask = mask & kept.astype(bool)[:, None, :, None]
        return self.encoder.run(x * real, mask, real, segment_ids, remat)

    def head(self, hidden: jax.Array, *, dense: bool = False) -> jax.Array:
        """hidden [B, T, D] -> fp32 logits: of words [B, T, V], or of a row's labels [B, C].

        dense: the table of words is known to be, as for `table_logits`.
        """
        if self.config.head == CLASSIFICATION:
            return self.classifier(self.pooler(hidden))
        head = self.lm_head if self.config.legacy else self.lm_predictions.lm_head
        return head(hidden, self.embeddings.word_embeddings.embedding[...], dense=dense)
