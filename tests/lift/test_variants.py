"""DoRA and VeRA through lift, against the dense weight that they stand for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from qlora_jax import lora
from qlora_jax.lift import lift
from qlora_jax.lora.dora import settle
from qlora_jax.lora.vera import PROJECTIONS
from qlora_jax.quant import NF4, QuantizedArray, quantize
from qlora_jax.training.masks import combine, partition, trainable_mask
from tests.lift.oracle import assert_close, kernel, normal

R, SCALING = 3, 1.5
RTOL = 5e-5
X = normal(0, 6, 64)


def layers(p: Any, x: jax.Array) -> jax.Array:
    """Stacked, scanned, recomputed."""

    @jax.checkpoint
    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

    return jax.lax.scan(step, x, p)[0]


def heads(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("td,dhk->thk", x, p["q"])


def tied(p: Any, x: jax.Array) -> jax.Array:
    rows = p["embedding"][jnp.arange(6) % 5]
    return jnp.tanh(rows + x) @ p["embedding"].T


def convolution(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x.reshape(1, 6, 64), p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


def experts(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, p["up"], jnp.asarray([2, 0, 4], jnp.int32))


@jax.custom_vjp
def _with_own_gradient(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


_with_own_gradient.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g)
)


def own_gradient(p: Any, x: jax.Array) -> jax.Array:
    return _with_own_gradient(x, p["w"])


Program = tuple[Callable[..., Any], dict[str, jax.Array], dict[str, tuple[int, int, int]]]
# Function, weights, and of each how many axes are stacked, contracted, outputs.
PROGRAMS: dict[str, Program] = {
    "layers": (
        layers,
        {"up": kernel(1, 2, 64, 96), "down": kernel(2, 2, 96, 64)},
        {"up": (1, 1, 1), "down": (1, 1, 1)},
    ),
    "heads": (heads, {"q": kernel(3, 64, 4, 8)}, {"q": (0, 1, 2)}),
    "tied": (tied, {"embedding": kernel(4, 70, 64)}, {"embedding": (0, 1, 1)}),
    "convolution": (convolution, {"kernel": kernel(5, 3, 64, 40)}, {"kernel": (0, 2, 1)}),
    "experts": (experts, {"up": kernel(6, 3, 64, 40)}, {"up": (1, 1, 1)}),
    "own gradient": (own_gradient, {"w": kernel(7, 64, 40)}, {"w": (0, 1, 1)}),
}


def prepare(program: str, variant: str, base: str) -> tuple[Any, dict[str, Any]]:
    """(frozen weights, adapters of them in which nothing is zero)."""
    _, weights, axes = PROGRAMS[program]
    frozen, adapters = {}, {}
    for seed, (name, w) in enumerate(weights.items()):
        lead, k, _ = axes[name]
        frozen[name] = quantize(w, NF4(), axes=axes[name][1:]) if base == "nf4" else w
        batch, k_shape, n_shape = w.shape[:lead], w.shape[lead : lead + k], w.shape[lead + k :]
        if variant == "dora":
            dense = frozen[name].dequantize() if base == "nf4" else w
            norms = jnp.sqrt(jnp.square(dense).sum(tuple(range(lead, lead + k))))
            adapters[name] = lora.LoraWeights(
                normal(10 + seed, *batch, *k_shape, R, scale=0.2),
                normal(20 + seed, *batch, R, *n_shape, scale=0.2),
                SCALING,
                magnitude=norms * (1.0 + 0.3 * normal(30 + seed, *batch, *n_shape)),
                base_norms=norms,
            )
        else:
            adapters[name] = lora.VeraWeights(
                normal(10 + seed, *batch, R), normal(20 + seed, *batch, *n_shape)
            )
    if variant == "vera":
        adapters[PROJECTIONS] = lora.VeraProjections(
            normal(8, 300, R, scale=0.2), normal(9, R, 200, scale=0.2)
        )
    return frozen, adapters


def densify(frozen: Any, adapters: dict[str, Any], axes: Any) -> dict[str, jax.Array]:
    """The weights that the equations of the papers give."""
    dense = {}
    for name, w in frozen.items():
        lead, k, _ = axes[name]
        w = w.dequantize() if isinstance(w, QuantizedArray) else w
        batch, n_shape, adapter = w.shape[:lead], w.shape[lead + k :], adapters[name]
        matrix = w.reshape(*batch, int(np.prod(w.shape[lead : lead + k])), -1)
        if isinstance(adapter, lora.LoraWeights):
            a = adapter.a.reshape(*batch, -1, R)
            b = adapter.b.reshape(*batch, R, -1)
            matrix = matrix + SCALING * (a @ b)
            length = jax.lax.stop_gradient(jnp.sqrt(jnp.square(matrix).sum(-2, keepdims=True)))
            matrix = adapter.magnitude.reshape(*batch, 1, -1) * matrix / length
        else:
            shared = adapters[PROJECTIONS]
            a, b = shared.a[: matrix.shape[-2]], shared.b[:, : matrix.shape[-1]]
            outputs = adapter.lambda_b.reshape(*batch, 1, -1)
            matrix = matrix + (a * adapter.lambda_d[..., None, :]) @ b * outputs
        dense[name] = matrix.reshape(*batch, *w.shape[lead : lead + k], *n_shape)
    return dense


def weighed(out: jax.Array) -> jax.Array:
    return jnp.vdot(normal(99, *out.shape), out)


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("variant", ["dora", "vera"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_like_the_dense_weight(program, variant, base):
    """Value, and gradients of what is trained and of the input."""
    fn, _, axes = PROGRAMS[program]
    frozen, adapters = prepare(program, variant, base)
    trained, fixed = partition(adapters, lora.trained_mask(adapters))

    def ours(trained: Any, x: jax.Array) -> jax.Array:
        attached = lora.attach(frozen, combine(trained, fixed))
        return weighed(lift(fn, strict=True)(attached, x))

    def theirs(trained: Any, x: jax.Array) -> jax.Array:
        return weighed(fn(densify(frozen, combine(trained, fixed), axes), x))

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(trained, X) for f in (ours, theirs))
    assert_close(got, want, RTOL, f"{program} {variant} {base}")
    for leaf in jax.tree.leaves(want[1]):
        assert np.abs(leaf).max() > 0


@pytest.mark.parametrize("variant", ["dora", "vera"])
def test_an_attached_tree_trained_by_a_mask(variant):
    """Norms follow A and B where those are changed in the tree itself."""
    fn, _, axes = PROGRAMS["layers"]
    frozen, adapters = prepare("layers", variant, "nf4")
    moved = jax.tree.map(lambda m, x: 1.1 * x if m else x, lora.trained_mask(adapters), adapters)
    tree = lora.attach(frozen, adapters)
    trained, rest = partition(tree, trainable_mask(tree))
    assert len(jax.tree.leaves(trained)) == len(frozen) * (3 if variant == "dora" else 2)
    tree = combine(jax.tree.map(lambda x: 1.1 * x, trained), rest)
    got = jax.jit(lift(fn, strict=True))(tree, X)
    assert_close(got, fn(densify(frozen, moved, axes), X), RTOL, variant)
    # Norms taken beforehand are those that lift takes; and a weight returned is as it came.
    assert_close(jax.jit(lift(fn, strict=True))(settle(tree), X), got, 1e-6, "settled")
    assert lift(lambda p: p, strict=True)(tree)["up"] is tree["up"]


@pytest.mark.parametrize("spec", [("i", None), (None, "i")], ids=["inputs cut", "outputs cut"])
@pytest.mark.parametrize("variant", ["dora", "vera"])
def test_cut_among_devices(variant, spec):
    """A column's norm is that of the whole column, wherever its parts are."""
    fn, _, axes = PROGRAMS["own gradient"]
    frozen, adapters = prepare("own gradient", variant, "dense")
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("i",))
    inputs, outputs = PartitionSpec(None, spec[0]), PartitionSpec(None, spec[1])

    def part(p: Any, x: jax.Array) -> jax.Array:
        out = x @ p["w"]
        return jax.lax.psum(out, "i") if spec[0] else out

    def whole(p: Any, x: jax.Array) -> jax.Array:
        specs = ({"w": PartitionSpec(*spec)}, inputs)
        return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=outputs)(p, x)

    got = jax.jit(lift(whole, strict=True))(lora.attach(frozen, adapters), X)
    assert_close(got, fn(densify(frozen, adapters, axes), X), RTOL, variant)


def test_dropout_hides_the_input_from_all_that_dora_changes():
    """W x + (gain - 1) W dropped + gain * scaling * B A dropped, as in the paper's program."""
    fn, _, _ = PROGRAMS["own gradient"]
    frozen, adapters = prepare("own gradient", "dora", "nf4")
    tree = lora.attach(frozen, adapters, dropout=0.5, key=jax.random.key(0))
    got = lift(lambda p, x: x @ p["w"], strict=True)(tree, X)
    keep = jax.random.bernoulli(tree["w"].dropout_key, 0.5, X.shape)
    dropped = jnp.where(keep, 2.0 * X, 0.0)
    w, dense = adapters["w"], frozen["w"].dequantize()
    merged = lora.merge(frozen, adapters)["w"]
    assert_close(got, X @ dense + dropped @ (merged - dense), RTOL, "dropout")
    assert w.magnitude is not None
