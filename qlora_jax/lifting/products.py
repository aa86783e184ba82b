"""Where a lazy weight is consumed: matrix products, row lookups, convolutions."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from qlora_jax.lifting.lazy import Lazy
from qlora_jax.lifting.view import Atom, View, sizes
from qlora_jax.lora.array import AdaptedArray, LoraArray, apart, map_stacked, together
from qlora_jax.lora.vera import VeraArray
from qlora_jax.quant import QuantizedArray, nf4_matmul, nf4_matmul_transposed
from qlora_jax.quant.varying import vary_alike


def matmul(x: jax.Array, w: Any, out_dtype: Any, precision: Any = None) -> jax.Array:
    """x [..., K] times one weight (no leading axes) seen as [K, N] -> [..., N].

    With an adapter: x W + scaling * (dropout(x) A) B, the two products added in `out_dtype`.
    """
    if isinstance(w, QuantizedArray):
        return nf4_matmul(x, w, out_dtype=out_dtype, precision=precision)
    if not isinstance(w, AdaptedArray):
        return _dot(x, w, out_dtype, precision)
    matrix = _matrix(w)
    return _adapted(
        x,
        w,
        lambda x: matmul(x, matrix, out_dtype, precision),
        lambda x: _low_rank(x, w, out_dtype, precision),
    )


def matmul_transposed(g: jax.Array, w: Any, out_dtype: Any, precision: Any = None) -> jax.Array:
    """g [..., N] times the transpose of one weight seen as [K, N] -> [..., K]."""
    if isinstance(w, QuantizedArray):
        return nf4_matmul_transposed(g, w, out_dtype=out_dtype, precision=precision)
    if not isinstance(w, AdaptedArray):
        return _dot(g, w.T, out_dtype, precision)
    if isinstance(w, LoraArray) and w.gain is not None:
        g = _scaled(g, w.gain.reshape(-1))
    base = matmul_transposed(g, _matrix(w), out_dtype, precision)
    return base + _low_rank_transposed(_dropout(g, w), w, out_dtype, precision)


def _matrix(w: AdaptedArray) -> Any:
    """The base of one weight; a dense one as [K, N]."""
    if isinstance(w.base, QuantizedArray):
        return w.base
    return w.base.reshape(math.prod(w.k_shape), -1)


def _adapted(
    x: jax.Array,
    w: AdaptedArray,
    base: Callable[[jax.Array], jax.Array],
    low_rank: Callable[[jax.Array], jax.Array],
    axis: int = -1,
) -> jax.Array:
    """What x makes of an adapted weight, from what it makes of the two parts; axis: of outputs."""
    dropped = _dropout(x, w)
    gain = w.gain if isinstance(w, LoraArray) else None
    if gain is None:
        return base(x) + low_rank(dropped)
    gain = gain.reshape(-1)
    if dropped is x:
        return _scaled(base(x) + low_rank(x), gain, axis)
    # As the paper's and PEFT's programs have it: dropout hides x from all that DoRA changes.
    return (
        base(x) + _scaled(base(dropped), gain - 1.0, axis) + _scaled(low_rank(dropped), gain, axis)
    )


def _scaled(y: jax.Array, gain: jax.Array, axis: int = -1) -> jax.Array:
    """y times fp32 `gain` [N] along `axis`, rounded once: small steps of a gain are not lost."""
    gain = gain.reshape(-1, *(1,) * (y.ndim - 1 - axis % y.ndim))

    # Under checkpoint y is kept in its own dtype for the gain's gradient, not in fp32.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def scale(y: jax.Array, gain: jax.Array) -> jax.Array:
        return (y.astype(jnp.float32) * gain).astype(y.dtype)

    return scale(y, gain)


def _low_rank(x: jax.Array, w: AdaptedArray, out_dtype: Any, precision: Any) -> jax.Array:
    """scaling * (x A) B for x [..., K], or what stands for it in VeRA."""
    a, _ = w.factors()
    if isinstance(w, VeraArray):
        return _from_rank(_dot(x, a, x.dtype, precision), w, out_dtype, precision)
    x, a = vary_alike((x, a))
    return _from_rank(_small_dot(x, a.astype(x.dtype), x.dtype, precision), w, out_dtype, precision)


def _from_rank(inner: jax.Array, w: AdaptedArray, out_dtype: Any, precision: Any) -> jax.Array:
    """The second half of it: inner [..., R], which is x A -> [..., N]."""
    _, b = w.factors()
    if isinstance(w, VeraArray):
        out = _dot(inner * w.lambda_d.astype(inner.dtype), b, out_dtype, precision)
        return out * w.lambda_b.reshape(-1).astype(out_dtype)
    assert isinstance(w, LoraArray)
    inner, b, scaling = vary_alike((inner, b, w.scaling))
    return _small_dot(inner, (b * scaling).astype(inner.dtype), out_dtype, precision)


def _low_rank_transposed(
    g: jax.Array, w: AdaptedArray, out_dtype: Any, precision: Any
) -> jax.Array:
    """The same of the transpose: scaling * (g B^T) A^T for g [..., N] -> [..., K]."""
    a, b = w.factors()
    if isinstance(w, VeraArray):
        inner = _dot(g * w.lambda_b.reshape(-1).astype(g.dtype), b.T, g.dtype, precision)
        return _dot(inner * w.lambda_d.astype(g.dtype), a.T, out_dtype, precision)
    assert isinstance(w, LoraArray)
    g, a, b, scaling = vary_alike((g, a, b, w.scaling))
    inner = _small_dot(g, b.T.astype(g.dtype), g.dtype, precision)
    return _small_dot(inner, (a.T * scaling).astype(g.dtype), out_dtype, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _small_dot(x: jax.Array, w: jax.Array, out_dtype: Any, precision: Any) -> jax.Array:
    """x [..., K] @ w [K, N] where one of K and N is the rank, and M, the rows of x, are many."""
    return _dot(x, w, out_dtype, precision)


def _small_dot_fwd(x: jax.Array, w: jax.Array, out_dtype: Any, precision: Any) -> Any:
    return _dot(x, w, out_dtype, precision), (x, w)


def _small_dot_bwd(out_dtype: Any, precision: Any, kept: Any, g: jax.Array) -> Any:
    """dw = x^T g, by transposing whichever of x and g has the rank for a width.

    JAX's own rule always transposes g, [M, N]; done to a wide one that costs more than the product.
    """
    x, w = kept
    g = g.astype(x.dtype)
    dx = jax.lax.dot_general(
        g, w, (((g.ndim - 1,), (1,)), ((), ())), precision=precision, preferred_element_type=x.dtype
    )
    rows, wide = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if rows.shape[1] <= wide.shape[1]:
        dw = jnp.dot(rows.T, wide, precision=precision, preferred_element_type=jnp.float32)
    else:
        dw = jnp.dot(wide.T, rows, precision=precision, preferred_element_type=jnp.float32).T
    return dx, dw.astype(w.dtype)


_small_dot.defvjp(_small_dot_fwd, _small_dot_bwd)


def _dot(x: jax.Array, w: jax.Array, out_dtype: Any, precision: Any) -> jax.Array:
    # Not "fp32, then cast": the gradient of that would multiply fp32 by bf16.
    return jnp.dot(x, w.astype(x.dtype), preferred_element_type=out_dtype, precision=precision)


def _dropout(x: jax.Array, w: AdaptedArray) -> jax.Array:
    if w.dropout_key is None:
        return x
    keep = jax.random.bernoulli(w.dropout_key, 1.0 - w.dropout, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - w.dropout, x.dtype), jnp.zeros((), x.dtype))


def promoted(x: jax.Array, weight: Any) -> jax.Array | None:
    """x in the type in which it and a weight (an aval) are multiplied, since primitives take two
    types; None if that is complex, which no 4-bit weight's product is."""
    if x.dtype == weight.dtype:
        return x
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(x.dtype, weight.dtype)
    return None if jnp.issubdtype(dtype, jnp.complexfloating) else x.astype(dtype)


def dot_general(eqn: JaxprEqn, lhs: Any, rhs: Any) -> jax.Array | None:
    """The rule for dot_general of a weight and an array; None if it is no product over K or N."""
    (lhs_c, rhs_c), (lhs_b, rhs_b) = eqn.params["dimension_numbers"]
    w_is_rhs = isinstance(rhs, Lazy)
    w, x = (rhs, lhs) if w_is_rhs else (lhs, rhs)
    if isinstance(x, Lazy):
        return None
    w_c, x_c = (rhs_c, lhs_c) if w_is_rhs else (lhs_c, rhs_c)
    w_b, x_b = (rhs_b, lhs_b) if w_is_rhs else (lhs_b, rhs_b)

    dims = w.view.dims
    contracted = [atom for i in w_c for atom in dims[i]]
    shared = [atom for i in w_b for atom in dims[i]]
    w_free = [atom for i, dim in enumerate(dims) if i not in (*w_c, *w_b) for atom in dim]
    batch, k, n = (w.view.of_kind(kind) for kind in ("batch", "k", "n"))
    if any(atom.kind != "batch" for atom in shared):
        return None
    # A matrix of one row or column has no atoms on that side; then both readings hold.
    if set(contracted) == set(k):
        product, inner, outer = matmul, k, n
    elif set(contracted) == set(n):
        product, inner, outer = matmul_transposed, n, k
    else:
        return None

    x = promoted(x, eqn.invars[int(w_is_rhs)].aval)
    if x is None:
        return None
    meeting = {at: dims[j] for j, at in zip((*w_c, *w_b), (*x_c, *x_b), strict=True)}
    # Label x's axes: by atoms where they meet the weight's, by themselves where they are free.
    labels: list[Any] = []
    shape: list[int] = []
    for i, size in enumerate(x.shape):
        met = meeting.get(i)
        labels += [f"x{i}"] if met is None else met
        shape += [size] if met is None else sizes(met)
    x_free = [label for label in labels if isinstance(label, str)]
    free_sizes = [x.shape[int(label[1:])] for label in x_free]
    lead = [atom for atom in batch if atom in shared]
    order = [labels.index(label) for label in (*lead, *x_free, *inner)]
    # Sizes that are spelled out, since reshape cannot infer one of an empty array.
    seen = (*sizes(lead), *free_sizes, math.prod(sizes(inner)))
    x = x.reshape(shape).transpose(order).reshape(seen)

    result: Any = eqn.outvars[0].aval
    precision = eqn.params["precision"]

    stacked, common = apart(w.array)

    def one(x: jax.Array, w: Any) -> jax.Array:
        return product(x, together(w, common), result.dtype, precision)

    for atom in reversed(batch):
        one = jax.vmap(one, in_axes=(0 if atom in shared else None, 0))
    out = one(x, stacked)

    # Now [batch..., free..., outer]; dot_general wants [shared..., lhs free..., rhs free...].
    have = [*batch, *x_free, *outer]
    free = (*x_free, *w_free) if w_is_rhs else (*w_free, *x_free)
    out = out.reshape(*sizes(batch), *free_sizes, *sizes(outer))
    out = out.transpose([have.index(label) for label in (*shared, *free)])
    return out.reshape(result.shape)


def gather(eqn: JaxprEqn, w: Any, indices: Any) -> Any:
    """The rule for taking whole slices along one axis.

    Rows of a table W [K, N] (an embedding) are decoded, those rows alone; one out of stacked
    weights stays lazy.
    """
    numbers = eqn.params["dimension_numbers"]
    if not isinstance(w, Lazy) or isinstance(indices, Lazy):
        return None
    if len(numbers.collapsed_slice_dims) != 1 or numbers.operand_batching_dims:
        return None
    view, (axis,) = w.view, numbers.collapsed_slice_dims
    whole = tuple(1 if i == axis else size for i, size in enumerate(view.shape))
    if numbers.start_index_map != (axis,) or eqn.params["slice_sizes"] != whole:
        return None
    count = view.shape[axis]
    ids = indices[..., 0]
    if w.batch_axis(axis) is not None and ids.ndim == 0:
        return _one_of_stack(eqn, w, axis, ids)
    rest = tuple(atom for i, dim in enumerate(view.dims) if i != axis for atom in dim)
    if view.of_kind("batch") or view.dims[axis] != view.of_kind("k") or rest != view.of_kind("n"):
        return None
    rows = _rows(w.array, jnp.clip(ids, 0, count - 1), w.dtype)
    if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        fill = jnp.nan if fill is None else fill
        inside = ((ids >= 0) & (ids < count))[..., None]
        rows = jnp.where(inside, rows, jnp.asarray(fill, rows.dtype))
    # Rows are [*ids, N]; gather puts the slice's dimensions where offset_dims says.
    result: Any = eqn.outvars[0].aval
    shape = result.shape
    places = numbers.offset_dims
    rows = rows.reshape(*ids.shape, *(shape[i] for i in places))
    return jnp.moveaxis(rows, range(ids.ndim, rows.ndim), places)


def _one_of_stack(eqn: JaxprEqn, w: Lazy, axis: int, index: jax.Array) -> Lazy:
    one = w.one_of_stack(axis, index)
    if eqn.params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return one
    inside = (index >= 0) & (index < w.shape[axis])

    def nan_outside(leaf: jax.Array) -> jax.Array:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.where(inside, leaf, jnp.asarray(jnp.nan, leaf.dtype)) if is_float else leaf

    return dataclasses.replace(one, array=map_stacked(nan_outside, one.array))


def _rows(w: Any, ids: jax.Array, dtype: Any) -> jax.Array:
    """Rows `ids` of one weight seen as [K, N] -> [*ids, N]."""
    if isinstance(w, QuantizedArray):
        return w.rows(ids, dtype)
    if not isinstance(w, AdaptedArray):
        return w[ids].astype(dtype)
    low_rank = _from_rank(w.factors()[0][ids], w, jnp.float32, None)
    rows = _rows(_matrix(w), ids, jnp.float32) + low_rank
    if isinstance(w, LoraArray) and w.gain is not None:
        rows = rows * w.gain.reshape(-1)
    return rows.astype(dtype)


def conv_general_dilated(eqn: JaxprEqn, x: Any, w: Any) -> jax.Array | None:
    """The rule for a convolution whose kernel is the weight, K being its window and input features.

    The frozen kernel is decoded for the convolution, and again for its gradient; the adapter is a
    convolution with A followed by a product with B.
    """
    if isinstance(x, Lazy) or not isinstance(w, Lazy) or w.view.of_kind("batch"):
        return None
    numbers = eqn.params["dimension_numbers"]
    if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
        return None
    features = numbers.rhs_spec[0]
    if w.view.dims[features] != w.view.of_kind("n"):
        return None
    options = eqn.params

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=options["window_strides"],
            padding=options["padding"],
            lhs_dilation=options["lhs_dilation"],
            rhs_dilation=options["rhs_dilation"],
            dimension_numbers=numbers,
            precision=options["precision"],
            preferred_element_type=options["preferred_element_type"],
        )

    array = w.array
    adapted = isinstance(array, AdaptedArray)
    frozen = Lazy(array.base if adapted else array, w.view, w.dtype, w.path)

    def base(x: jax.Array) -> jax.Array:
        # Under checkpoint only the 4-bit kernel is kept for the backward pass.
        return jax.checkpoint(lambda x, w: conv(x, _dense_kernel(w)))(x, frozen)

    if not adapted:
        return base(x)
    a, _ = array.factors()
    dims = list(w.view.dims)
    dims[features] = (Atom((), "n", a.shape[-1]),)
    kernel = w.arrange(a.astype(w.dtype), View(tuple(dims)))
    channel = numbers.out_spec[1]

    def low_rank(x: jax.Array) -> jax.Array:
        inner = jnp.moveaxis(conv(x, kernel), channel, -1)
        out = _from_rank(inner, array, inner.dtype, options["precision"])
        return jnp.moveaxis(out, -1, channel)

    return _adapted(x, array, base, low_rank, channel)


def _dense_kernel(w: Lazy) -> jax.Array:
    if isinstance(w.array, QuantizedArray):
        return w.dense()
    return w.arrange(w.array.astype(w.dtype), w.view)
