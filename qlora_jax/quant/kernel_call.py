"""What vmap and sharding mean for a matmul kernel, which the compiler cannot look into.

Both act on the arrays around the kernel: a batch of inputs folds into its rows, so that the weight
is read once; under a mesh every device calls the kernel on its own part.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.quant import blockwise


def kernel_call(
    kernel: Callable[..., jax.Array],
    *,
    transposed: bool,
    reads_nested: Callable[[int], bool] = lambda rows: False,
    look_up: blockwise.LookUp = blockwise.look_up,
) -> Callable[..., jax.Array]:
    """`kernel`(x, codes, scales, codebook, *nested, out_dtype=, precision=), fit for vmap and jit.

    nested: the nested absmax, the offset and the levels of double-quantized scales, or nothing.
    Where it `reads_nested`, for that many rows of x, the kernel takes them and reads the scales
    itself; otherwise it gets fp32 scales, their levels found by `look_up`.
    """

    def call(
        x: jax.Array, codes: jax.Array, scales: jax.Array, codebook: jax.Array,
        *nested: jax.Array, out_dtype: Any, precision: Any, part: blockwise.Part | None = None,
    ) -> jax.Array:  # fmt: skip
        if nested and part is not None:
            scales = blockwise.dequantize_scales(scales, *nested, part=part, look_up=look_up)
            nested = ()

        def run(
            x: jax.Array, codes: jax.Array, scales: jax.Array, codebook: jax.Array,
            *nested: jax.Array, part: Any = None, dtype: Any = out_dtype,
        ) -> jax.Array:  # fmt: skip
            if nested and (part is not None or not reads_nested(x.shape[0])):
                scales = blockwise.dequantize_scales(scales, *nested, part=part, look_up=look_up)
                nested = ()
            return kernel(x, codes, scales, codebook, *nested, out_dtype=dtype, precision=precision)

        block = 2 * codes.shape[0] // scales.shape[0]
        partitioned = _partitioned(run, transposed, block, bool(nested), out_dtype)
        return _batched(partitioned)(x, codes, scales, codebook, *nested)

    return call


def _batched(call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    @jax.custom_batching.custom_vmap
    def mapped(x: Any, *weight: Any) -> jax.Array:
        return call(x, *weight)

    @mapped.def_vmap
    def rule(size: int, batched: list[bool], x: Any, *weight: Any) -> tuple[jax.Array, bool]:
        if not any(batched[1:]):
            out = mapped(x.reshape(-1, x.shape[-1]), *weight)
            return out.reshape(size, -1, out.shape[-1]), True
        # A weight for each: one after the other, as a scan over layers would.
        args = [
            a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
            for a, is_batched in zip((x, *weight), batched, strict=True)
        ]
        return jax.lax.map(lambda one: mapped(*one), args), True

    return mapped


def _partitioned(
    run: Callable[..., jax.Array], transposed: bool, block: int, nested: bool, out_dtype: Any
) -> Callable[..., jax.Array]:
    """x [M, in], codes, scales, codebook, *nested -> [M, out], each device on its own part.

    Rows and outputs are computed where they lie. A contraction that is split over devices of its
    own (tensor parallelism along the contraction) is summed over them, in fp32. A weight split over
    the devices that also split the rows (FSDP) is gathered, in 4 bits and with 8-bit scales.
    """

    @custom_partitioning
    def call(x: Any, *weight: Any) -> jax.Array:
        return run(x, *weight)

    def partition(mesh: Any, args: Any, result: Any) -> Any:
        x, codes = (_spec(arg.sharding) for arg in args[:2])
        (rows, inner), (along_k, along_n) = x, codes
        weight_inner, outputs = (along_n, along_k) if transposed else (along_k, along_n)
        taken = set(_names(rows))
        inner = inner if inner is not None else weight_inner
        inner = None if taken & set(_names(inner)) else inner
        taken |= set(_names(inner))
        outputs = None if taken & set(_names(outputs)) else outputs
        # Each device needs whole blocks of the weight.
        k_axes = outputs if transposed else inner
        if args[2].shape[0] % _count(mesh, k_axes):
            outputs, inner = (None, inner) if transposed else (outputs, None)
        place = PartitionSpec(*((outputs, inner) if transposed else (inner, outputs)))
        specs = (PartitionSpec(rows, inner), place, place, *[PartitionSpec()] * len(args[3:]))

        def local(x: Any, codes: Any, scales: Any, codebook: Any, *nested: Any) -> Any:
            part = None
            if any(place):
                # 256 scales share a nested absmax, across columns: each finds its own by its place
                # in the whole weight.
                first = [
                    size * jax.lax.axis_index(_names(axes)) if axes is not None else 0
                    for size, axes in zip(scales.shape, place, strict=True)
                ]
                part = blockwise.Part(first, args[2].shape)
            if inner is None:
                return run(x, codes, scales, codebook, *nested, part=part)
            out = run(x, codes, scales, codebook, *nested, part=part, dtype=jnp.float32)
            return jax.lax.psum(out, _names(inner)).astype(out_dtype)

        shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
        return mesh, local, NamedSharding(mesh, PartitionSpec(rows, outputs)), shardings

    def infer(mesh: Any, args: Any, result: Any) -> Any:
        return partition(mesh, args, result)[2]

    # K is b blocks of r; a block has h bytes. The compiler may split blocks, not what is in them.
    weight = "(b h) n, b n, t" + (", a, , l" if nested else "")
    rule = f"m n, {weight} -> m (b r)" if transposed else f"m (b r), {weight} -> m n"
    call.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        r=block,
        h=block // 2,
    )
    return call


def _spec(sharding: Any) -> tuple[Any, Any]:
    spec = tuple(getattr(sharding, "spec", ()) or ())
    return (*spec, None, None)[:2]  # type: ignore[return-value]


def _names(axes: Any) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _count(mesh: Any, axes: Any) -> int:
    count = 1
    for name in _names(axes):
        count *= mesh.shape[name]
    return count
