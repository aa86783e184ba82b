"""shard_map on eight virtual CPU devices: the plain function shards W, lift its parts."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax import lora
from qlora_jax.lift import lift
from tests.lift.oracle import (
    RTOL,
    assert_close,
    check,
    compare,
    densify,
    equations,
    kernel,
    normal,
    prepare,
    results,
)
from tests.lift.test_custom import product_jvp

DEVICES = 8
BASES = ("nf4", "dense", "frozen")
COLUMNS = {"w": kernel(0, 64, 128)}
ROWS = {"w": kernel(0, 512, 40)}
AXES = {"w": (1, 1)}


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    assert jax.device_count() == DEVICES
    return jax.make_mesh((DEVICES,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))


def test_replicated_weights_sharded_batch(mesh: Any) -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        run = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
        return jax.shard_map(run, mesh=mesh, in_specs=(P(), P("m")), out_specs=P("m"))(p["w"], x)

    check(fn, COLUMNS, AXES, normal(1, 16, 64), bases=BASES)


def test_mean_over_a_sharded_batch(mesh: Any) -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        def run(w: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.pmean(jnp.mean(jnp.tanh(x @ w)), "m")

        return jax.shard_map(run, mesh=mesh, in_specs=(P(), P("m")), out_specs=P())(p["w"], x)

    check(fn, COLUMNS, AXES, normal(1, 16, 64), bases=BASES)


def test_column_parallel(mesh: Any) -> None:
    """W sharded along N."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        specs = (P(None, "m"), P())
        run = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(None, "m"))(p["w"], x)

    check(fn, COLUMNS, AXES, normal(1, 5, 64), bases=BASES)


def test_weight_into_a_custom_jvp(mesh: Any) -> None:
    """Its tangents vary over the mesh as the arguments do; the weight's gradient is summed."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        specs = (P("m"), P())
        return jax.shard_map(product_jvp, mesh=mesh, in_specs=specs, out_specs=P("m"))(x, p["w"])

    check(fn, COLUMNS, AXES, normal(1, 16, 64), bases=BASES)


def test_row_parallel(mesh: Any) -> None:
    """W sharded along K in whole blocks; the partial products are summed."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        specs = (P("m", None), P(None, "m"))
        run = lambda w, x: jax.lax.psum(x @ w, "m")  # noqa: E731
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P())(p["w"], x)

    check(fn, ROWS, AXES, normal(1, 5, 512), bases=BASES)


def test_tensor_parallel_mlp_under_scan(mesh: Any) -> None:
    """Stacked layers, column- then row-parallel, the loop inside the shard_map."""
    params = {"up": kernel(0, 2, 64, 512), "down": kernel(1, 2, 512, 64)}
    specs = {"up": P(None, None, "m"), "down": P(None, "m", None)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        def run(p: Any, x: jax.Array) -> jax.Array:
            def step(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
                return x + jax.lax.psum(jnp.tanh(x @ w["up"]) @ w["down"], "m"), None

            return jax.lax.scan(step, x, p)[0]

        return jax.shard_map(run, mesh=mesh, in_specs=(specs, P()), out_specs=P())(p, x)

    check(fn, params, {"up": (1, 1), "down": (1, 1)}, normal(2, 5, 64), bases=("nf4", "dense"))


def test_scan_around_shard_map(mesh: Any) -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        part = jax.shard_map(
            lambda w, x: jax.lax.psum(x @ w, "m"),
            mesh=mesh,
            in_specs=(P("m", None), P(None, "m")),
            out_specs=P(),
        )
        return jax.lax.scan(lambda x, w: (jnp.tanh(part(w, x)), None), x, p["w"])[0]

    check(fn, {"w": kernel(0, 2, 512, 512)}, AXES, normal(1, 5, 512), bases=("nf4", "dense"))


def test_sharded_stack(mesh: Any) -> None:
    """Experts: every device holds some of the stacked weights."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        run = lambda w, x: jnp.einsum("ebk,ekn->ebn", x, w)  # noqa: E731
        specs = (P("m"), P("m"))
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("m"))(p["w"], x)

    check(fn, {"w": kernel(0, 16, 64, 40)}, AXES, normal(1, 16, 5, 64), bases=("nf4", "dense"))


def test_heads_sharded(mesh: Any) -> None:
    """A kernel [D, H, Dh] sharded by heads."""
    params = {"w": kernel(0, 64, 8, 16)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        run = lambda w, x: jnp.einsum("td,dhk->htk", x, w)  # noqa: E731
        specs = (P(None, "m"), P())
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("m"))(p["w"], x)

    check(fn, params, {"w": (1, 2)}, normal(1, 5, 64), bases=("nf4", "dense"))


def test_two_mesh_axes() -> None:
    """Data parallel over one axis, tensor parallel over the other."""
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        run = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
        specs = (P(None, "m"), P("d"))
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("d", "m"))(p["w"], x)

    check(fn, COLUMNS, AXES, normal(1, 4, 64), bases=("nf4", "dense"))


def test_blocks_that_devices_would_share(mesh: Any) -> None:
    """K / 8 = 24 is no whole block: right all the same, made dense if need be."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        specs = (P("m", None), P(None, "m"))
        run = lambda w, x: jax.lax.psum(x @ w, "m")  # noqa: E731
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P())(p["w"], x)

    check(fn, {"w": kernel(0, 192, 40)}, AXES, normal(1, 5, 192), bases=("nf4",), strict=False)


def test_codes_stay_sharded(mesh: Any) -> None:
    """No device sees codes or a decoded weight of full width."""
    frozen, adapters = prepare(COLUMNS, AXES, "nf4")

    def fn(p: Any, x: jax.Array) -> jax.Array:
        specs = (P(None, "m"), P())
        run = lambda w, x: x @ w  # noqa: E731
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(None, "m"))(p["w"], x)

    jaxpr = jax.make_jaxpr(lift(fn, strict=True))(lora.attach(frozen, adapters), normal(1, 5, 64))
    (inner,) = [eqn for eqn in equations(jaxpr) if "shard_map" in eqn.primitive.name]
    sizes = {
        (aval.dtype, aval.size) for eqn in equations(inner.params["jaxpr"]) for aval in results(eqn)
    }
    assert max(size for _, size in sizes) <= 64 * 128 // DEVICES


@pytest.mark.parametrize("base", ("nf4", "dense"))
def test_shard_map_around_a_lifted_function(mesh: Any, base: str) -> None:
    """Data parallel from outside: the weights are pytrees and take a spec as such."""
    frozen, adapters = prepare(COLUMNS, AXES, base)
    plain = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    lifted = lift(plain, strict=True)
    sharded = jax.shard_map(lifted, mesh=mesh, in_specs=(P(), P("m")), out_specs=P("m"))
    compare(
        lambda a, x: sharded(lora.attach(frozen, a), x),
        lambda a, x: plain(densify(frozen, a), x),
        adapters,
        normal(1, 16, 64),
    )


def test_sharding_constraints(mesh: Any) -> None:
    """Constraints on weights and activations inside the function, the compiler doing the rest."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        w = jax.lax.with_sharding_constraint(p["w"], NamedSharding(mesh, P(None, "m")))
        return jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P(None, "m")))

    check(fn, COLUMNS, AXES, normal(1, 5, 64), bases=("nf4", "dense"))


def test_weights_placed_on_the_mesh(mesh: Any) -> None:
    """Sharded leaves in, sharded activations out of jit, without a shard_map."""
    frozen, adapters = prepare(COLUMNS, AXES, "nf4")
    columns = NamedSharding(mesh, P(None, "m"))
    everywhere = NamedSharding(mesh, P())
    placed = jax.tree.map(
        lambda x: jax.device_put(x, columns if x.ndim == 2 else everywhere), frozen
    )
    fn = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    x = jax.device_put(normal(1, 5, 64), everywhere)
    got = jax.jit(lift(fn, strict=True))(lora.attach(placed, adapters), x)
    assert_close(got, fn(densify(frozen, adapters), normal(1, 5, 64)), RTOL, "out")
