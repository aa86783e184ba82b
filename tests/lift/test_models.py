"""Whole models of Linen and NNX with every kind of layer at once, through each transform."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from tests.lift.oracle import check, named, normal

pytestmark = pytest.mark.slow

LAYERS, WIDTH, HEADS, TOKENS = 2, 64, (4, 16), 40
POLICY = jax.checkpoint_policies.dots_saveable
AXES = {
    "embed/embedding": (1, 1),
    "query/kernel": (1, 2),
    "out/kernel": (2, 1),
    "mix/kernel": (1, 2),
    "join/kernel": (2, 1),
    "conv/kernel": (2, 1),
    "dense/kernel": (1, 1),
}
SPLIT, JOIN = "btd,dhk->bhtk", "bhtk,hkd->btd"
HOW = ("unrolled", "remat", "scan", "scan of remat")


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        y = nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(
            nn.tanh(nn.DenseGeneral(HEADS, name="query")(x))
        )
        y = nn.Einsum((WIDTH, *HEADS), SPLIT, name="mix")(y)
        y = nn.Einsum((*HEADS, WIDTH), JOIN, name="join")(nn.tanh(y))
        y = nn.Conv(WIDTH, (3,), name="conv")(nn.tanh(y))
        return x + nn.Dense(WIDTH, name="dense")(nn.tanh(y)), None


class LinenModel(nn.Module):
    how: str

    @nn.compact
    def __call__(self, ids: jax.Array, x: jax.Array) -> jax.Array:
        embed = nn.Embed(TOKENS, WIDTH, name="embed")
        x = x + embed(ids)
        scan = "scan" in self.how
        block = LinenBlock
        if "remat" in self.how:
            block = nn.remat(LinenBlock, prevent_cse=not scan, policy=POLICY)
        if scan:
            options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(block, length=LAYERS, **options)(name="layers")(x, None)
        else:
            for index in range(LAYERS):
                x, _ = block(name=f"layer_{index}")(x, None)
        return embed.attend(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query = nnx.LinearGeneral(WIDTH, HEADS, rngs=rngs)
        self.out = nnx.LinearGeneral(HEADS, WIDTH, axis=(-2, -1), rngs=rngs)
        self.mix = nnx.Einsum(SPLIT, (WIDTH, *HEADS), rngs=rngs)
        self.join = nnx.Einsum(JOIN, (*HEADS, WIDTH), rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs)
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.out(jnp.tanh(self.query(x)))
        y = self.conv(jnp.tanh(self.join(jnp.tanh(self.mix(y)))))
        return x + self.dense(jnp.tanh(y))


class NnxModel(nnx.Module):
    def __init__(self, how: str, rngs: nnx.Rngs) -> None:
        self.how = how
        self.embed = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
        if "scan" in how:
            make = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)
            self.layers = nnx.split_rngs(splits=LAYERS)(make)(rngs)
        else:
            self.first, self.second = NnxBlock(rngs), NnxBlock(rngs)

    def __call__(self, ids: jax.Array, x: jax.Array) -> jax.Array:
        def call(layer: NnxBlock, x: jax.Array) -> jax.Array:
            return layer(x)

        x = x + self.embed(ids)
        if "remat" in self.how:
            call = nnx.remat(call, policy=POLICY)
        if "scan" in self.how:
            x = nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)
        else:
            x = call(self.second, call(self.first, x))
        return self.embed.attend(x)


def linen(how: str, *inputs: jax.Array) -> tuple[Callable[..., jax.Array], Any]:
    module = LinenModel(how)
    params = module.init(jax.random.key(0), *inputs)["params"]
    return lambda p, *xs: module.apply({"params": p}, *xs), params


def of_nnx(how: str, *_: jax.Array) -> tuple[Callable[..., jax.Array], Any]:
    graphdef, state, rest = nnx.split(NnxModel(how, nnx.Rngs(0)), nnx.Param, ...)
    return lambda p, *xs: nnx.merge(graphdef, p, rest)(*xs), nnx.to_pure_dict(state)


@pytest.mark.parametrize("batch", ("whole", "vmap of jit"))
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("make", (linen, of_nnx), ids=("linen", "nnx"))
def test_like_the_dense_model(make: Any, how: str, batch: str) -> None:
    ids = jnp.asarray(np.random.default_rng(0).integers(0, TOKENS, (3, 5)))
    x = normal(1, 3, 5, WIDTH)
    whole, params = make(how, ids, x)

    def by_row(p: Any, ids: jax.Array, x: jax.Array) -> jax.Array:
        one = jax.jit(lambda ids, x: whole(p, ids[None], x[None])[0])
        return jax.vmap(one)(ids, x)

    weights = [path for path in named(params) if path.endswith(("kernel", "embedding"))]
    axes = {path: AXES["/".join(path.split("/")[-2:])] for path in weights}
    assert len(axes) == 1 + 6 * (1 if "scan" in how else LAYERS)
    fn = whole if batch == "whole" else by_row
    # Twelve products one after the other: more rounding than one layer has.
    check(fn, params, axes, ids, x, bases=("nf4", "dense"), rtol=1e-4)
