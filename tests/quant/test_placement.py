"""Products over a mesh: those of one device, whatever is split, and only bytes are gathered."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.parallel import make_mesh
from qlora_jax.quant import nf4_matmul
from qlora_jax.quant.placement import Placement

pytestmark = pytest.mark.quick

K, N = 256, 64
ROWS = ("data", "fsdp")
SPLITS = (
    (("fsdp",), ("tensor",)),
    (("tensor",), ("fsdp",)),
    ((), ("tensor", "fsdp")),
    (("tensor", "fsdp"), ()),
    ((), ()),
)


def weight(double_quant: bool, seed: int) -> qj.QuantizedArray:
    x = jax.random.normal(jax.random.key(seed), (K, N))
    return qj.quantize(x, qj.NF4(double_quant=double_quant))


def product_and_gradient(x: jax.Array, w: qj.QuantizedArray) -> Any:
    out, pull = jax.vjp(lambda x: nf4_matmul(x, w), x)
    return out, pull(jnp.sin(out))[0]


@pytest.mark.parametrize("rows", [8, 3])
def test_products_are_those_of_one_device(rows: int) -> None:
    """3 rows cannot be split: they go to where the parts of the weight lie."""
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    x = jax.random.normal(jax.random.key(9), (rows, K))
    weights = [weight(bool(i % 2), i) for i in range(len(SPLITS))]
    placed = [
        dataclasses.replace(w, placement=Placement(mesh, k, n, ROWS))
        for w, (k, n) in zip(weights, SPLITS, strict=True)
    ]
    program = jax.jit(lambda x, ws: [product_and_gradient(x, w) for w in ws])
    got, want = (jax.tree.leaves(program(x, ws)) for ws in (placed, weights))
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)
    jaxpr = str(jax.make_jaxpr(program)(x, placed))
    gathers = re.findall(r":(\w+)\[(\d+),(\d+)\] = all_gather", jaxpr)
    assert bool(gathers) is (rows == 8)
    for dtype, k, n in gathers:  # scales are fp32 where they are not quantized too
        assert dtype == "u8" or int(k) * int(n) <= K // 64 * N


def test_what_is_gathered_lies_side_by_side() -> None:
    with pytest.raises(ValueError, match="must come last"):
        Placement(make_mesh("fsdp=4,tensor=2"), n=("fsdp", "tensor"), rows=ROWS)
