"""Single layers of Flax, Linen and NNX: each kind of kernel, each way of consuming it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from tests.lift.oracle import BASES, check, normal

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (3, 5)))


class LinenTied(nn.Module):
    """A table that is looked up, and multiplied with at the end."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(40, 96)
        return embed.attend(nn.tanh(nn.Dense(96)(embed(ids))))


class NnxTied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(40, 96, rngs=rngs)
        self.dense = nnx.Linear(96, 96, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(jnp.tanh(self.dense(self.embed(ids))))


ATTENTION = {"query": (1, 2), "key": (1, 2), "value": (1, 2), "out": (2, 1)}
ATTENTION_AXES = {f"{name}/kernel": axes for name, axes in ATTENTION.items()}

LINEN: dict[str, tuple[Any, Any, dict[str, tuple[int, int]]]] = {
    "dense": (nn.Dense(40), (3, 5, 96), {"kernel": (1, 1)}),
    "dense_no_bias": (nn.Dense(40, use_bias=False), (96,), {"kernel": (1, 1)}),
    "heads_out": (nn.DenseGeneral((4, 10)), (3, 5, 96), {"kernel": (1, 2)}),
    "heads_in": (nn.DenseGeneral(40, axis=(-2, -1)), (3, 5, 4, 24), {"kernel": (2, 1)}),
    "first_axis": (nn.DenseGeneral(40, axis=(0,)), (96, 5), {"kernel": (1, 1)}),
    "batched": (nn.DenseGeneral(40, axis=-1, batch_dims=(0,)), (3, 5, 96), {"kernel": (1, 1)}),
    "einsum_out": (nn.Einsum((96, 4, 10), "btd,dhk->bhtk"), (3, 5, 96), {"kernel": (1, 2)}),
    "einsum_in": (nn.Einsum((4, 24, 40), "bhtk,hkd->btd"), (3, 4, 5, 24), {"kernel": (2, 1)}),
    "embed": (nn.Embed(40, 96), IDS, {"embedding": (1, 1)}),
    "tied": (LinenTied(), IDS, {"Embed_0/embedding": (1, 1), "Dense_0/kernel": (1, 1)}),
    "conv_1d": (nn.Conv(12, (3,)), (3, 7, 32), {"kernel": (2, 1)}),
    "conv_2d_strided": (nn.Conv(12, (3, 3), strides=2), (2, 7, 6, 16), {"kernel": (3, 1)}),
    "conv_dilated": (
        nn.Conv(12, (3,), kernel_dilation=2, padding="VALID"),
        (2, 9, 32),
        {"kernel": (2, 1)},
    ),
    "conv_transpose": (nn.ConvTranspose(12, (3,), strides=(2,)), (2, 5, 32), {"kernel": (2, 1)}),
    "attention": (nn.MultiHeadDotProductAttention(4), (2, 5, 64), ATTENTION_AXES),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name: str) -> None:
    module, x, axes = LINEN[name]
    x = normal(1, *x) if isinstance(x, tuple) else x
    params = module.init(jax.random.key(0), x)["params"]
    check(lambda p, x: module.apply({"params": p}, x), params, axes, x, bases=BASES)


def _attention(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.MultiHeadAttention(num_heads=4, in_features=64, decode=False, rngs=rngs)


NNX: dict[str, tuple[Any, Any, dict[str, tuple[int, int]]]] = {
    "linear": (lambda r: nnx.Linear(96, 40, rngs=r), (3, 5, 96), {"kernel": (1, 1)}),
    "heads_out": (
        lambda r: nnx.LinearGeneral(96, (4, 10), rngs=r),
        (3, 5, 96),
        {"kernel": (1, 2)},
    ),
    "heads_in": (
        lambda r: nnx.LinearGeneral((4, 24), 40, axis=(-2, -1), rngs=r),
        (3, 5, 4, 24),
        {"kernel": (2, 1)},
    ),
    "einsum_out": (
        lambda r: nnx.Einsum("btd,dhk->bhtk", (96, 4, 10), rngs=r),
        (3, 5, 96),
        {"kernel": (1, 2)},
    ),
    "einsum_in": (
        lambda r: nnx.Einsum("bhtk,hkd->btd", (4, 24, 40), rngs=r),
        (3, 4, 5, 24),
        {"kernel": (2, 1)},
    ),
    "embed": (lambda r: nnx.Embed(40, 96, rngs=r), IDS, {"embedding": (1, 1)}),
    "tied": (NnxTied, IDS, {"embed/embedding": (1, 1), "dense/kernel": (1, 1)}),
    "conv_2d": (
        lambda r: nnx.Conv(16, 12, (3, 3), rngs=r),
        (2, 7, 6, 16),
        {"kernel": (3, 1)},
    ),
    "attention": (_attention, (2, 5, 64), ATTENTION_AXES),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx(name: str) -> None:
    make, x, axes = NNX[name]
    x = normal(1, *x) if isinstance(x, tuple) else x
    graphdef, state, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
    params = nnx.to_pure_dict(state)
    check(lambda p, x: nnx.merge(graphdef, p, rest)(x), params, axes, x, bases=BASES)


def test_ids_outside_the_table() -> None:
    """jnp's rules: negative ids count from the end, ids beyond it give the last row or a fill."""
    ids = jnp.asarray([0, -1, 39, -40])
    table = {"table": normal(0, 40, 64)}
    check(lambda p, ids: p["table"][ids], table, {"table": (1, 1)}, ids, bases=("nf4", "dense"))
    beyond = jnp.asarray([3, 41])
    clip = lambda p, ids: jnp.take(p["table"], ids, axis=0, mode="clip")  # noqa: E731
    check(clip, table, {"table": (1, 1)}, beyond, bases=("nf4", "dense"))
    zero = lambda p, ids: p["table"].at[ids].get(mode="fill", fill_value=0.0)  # noqa: E731
    check(zero, table, {"table": (1, 1)}, beyond, bases=("nf4", "dense"))


def test_nnx_state_keeps_its_type() -> None:
    """The tree may also be an nnx.State, its Params holding the weights."""
    from qlora_jax import lora
    from qlora_jax.lift import lift
    from qlora_jax.quant import NF4, quantize_tree

    graphdef, state = nnx.split(nnx.Linear(96, 40, rngs=nnx.Rngs(0)))
    x = normal(1, 3, 96)
    quantized = quantize_tree(state, NF4())
    adapters = lora.init(jax.random.key(0), quantized, lora.LoraConfig(rank=2))
    assert list(adapters) == ["kernel"]
    weights = lora.LoraWeights(adapters["kernel"].a, normal(2, 2, 40), 1.5)
    attached = lora.attach(quantized, {"kernel": weights})
    got = lift(lambda s, x: nnx.merge(graphdef, s)(x), strict=True)(attached, x)
    dense = quantized["kernel"].get_value().dequantize() + 1.5 * weights.a @ weights.b
    np.testing.assert_allclose(got, x @ dense, rtol=0, atol=1e-5)
