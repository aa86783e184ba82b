"""Weights with their adapters, standing in a parameter tree where the kernels stood."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qlora_jax.quant import QuantizedArray

Scaling = float | tuple[float, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeights:
    """The adapter of one weight W [..., *K axes, *N axes].

    a           fp32 [..., *K axes, R]
    b           fp32 [..., R, *N axes]
    scaling     factor on A B; if stacked weights differ (those of an imported adapter may), one for
                each, in the order of their storage
    magnitude   fp32 [..., *N axes], DoRA's (see `lora.dora`); None: no DoRA
    base_norms  fp32 [..., *N axes], the length of each column of W, which stays as it is; with
                `magnitude` only
    """

    TRAINED: ClassVar = ("a", "b", "magnitude")

    a: Any
    b: Any
    scaling: Scaling = dataclasses.field(metadata={"static": True})
    magnitude: Any = None
    base_norms: Any = None

    @property
    def rank(self) -> int:
        """R, the inner size of the product A B."""
        return self.a.shape[-1]

    def on(self, base: Any, dropout_key: Any = None, dropout: float = 0.0) -> "LoraArray":
        """`base` with this adapter; dropout_key: one for each stacked weight."""
        batch = base.shape[: self.a.ndim + self.b.ndim - 2 - base.ndim]
        scaling = jnp.asarray(self.scaling, jnp.float32)
        each = isinstance(self.scaling, tuple)
        scaling = scaling.reshape(batch) if each else jnp.broadcast_to(scaling, batch)
        return LoraArray(
            base,
            self.a,
            self.b,
            scaling,
            dropout_key,
            dropout,
            magnitude=self.magnitude,
            base_norms=self.base_norms,
        )


class AdaptedArray:
    """What stands for a dense W' = W + something trained, which is never formed.

    base: W [..., *K axes, *N axes], dense or QuantizedArray. Subclasses are pytrees whose leaves
    share the leading axes, so that slicing and scanning work; those in SHARED have none of them and
    belong to all stacked weights alike. TRAINED: the fields that have gradients.
    """

    TRAINED: ClassVar[tuple[str, ...]]
    SHARED: ClassVar[tuple[str, ...]] = ()

    base: Any
    dropout_key: Any
    dropout: float

    @property
    def k_ndim(self) -> int:
        """How many axes of W are contracted."""
        raise NotImplementedError

    @property
    def n_ndim(self) -> int:
        """How many axes of W are outputs."""
        raise NotImplementedError

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """A as [..., K, R] and B as [..., R, N]; what is shared without leading axes."""
        raise NotImplementedError

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """Dense W' [..., *K axes, *N axes], summed in fp32 and rounded once to `dtype`."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Of W: [..., *K, *N]."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """Axes of W, stacked ones included."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the dense W: the base's own, not that of its codes."""
        return self.base.dtype

    @property
    def size(self) -> int:
        """How many numbers W has; not bytes."""
        return math.prod(self.shape)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the stacked axes; () for a single weight."""
        return self.shape[: self.ndim - self.k_ndim - self.n_ndim]

    @property
    def k_shape(self) -> tuple[int, ...]:
        """Sizes of the contracted axes."""
        end = self.ndim - self.n_ndim
        return self.shape[end - self.k_ndim : end]

    @property
    def n_shape(self) -> tuple[int, ...]:
        """Sizes of the output axes."""
        return self.shape[self.ndim - self.n_ndim :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraArray(AdaptedArray):
    """W + scaling * A B, never formed; under DoRA its columns brought to given lengths.

    base         W [..., *K axes, *N axes], dense or QuantizedArray
    a, b         fp32 [..., *K axes, R] and [..., R, *N axes]
    scaling      fp32 [...], one number for each stacked weight
    dropout_key  None, or a key [...] for each stacked weight: inputs of A are dropped with
                 probability `dropout`
    magnitude    None, or fp32 [..., *N axes]: the lengths
    base_norms   as in LoraWeights
    gain         None, or fp32 [..., *N axes], a factor on each column: what `lift` makes of the
                 two above, once for all uses of the weight
    """

    TRAINED: ClassVar = ("a", "b", "magnitude", "gain")

    base: Any
    a: Any
    b: Any
    scaling: Any
    dropout_key: Any = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    magnitude: Any = None
    base_norms: Any = None
    gain: Any = None

    @property
    def k_ndim(self) -> int:
        return self.ndim - self.b.ndim + 1

    @property
    def n_ndim(self) -> int:
        return self.ndim - self.a.ndim + 1

    def factors(self) -> tuple[jax.Array, jax.Array]:
        batch, rank = self.batch_shape, self.a.shape[-1]
        return self.a.reshape(*batch, -1, rank), self.b.reshape(*batch, rank, -1)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        a, b = self.factors()
        low_rank = jnp.einsum("...kr,...rn->...kn", a, b * self.scaling[..., None, None])
        dense = dense_base(self.base, jnp.float32) + low_rank.reshape(self.shape)
        batch = len(self.batch_shape)
        k_axes, gain = tuple(range(batch, batch + self.k_ndim)), self.gain
        if self.magnitude is not None:
            squares = jnp.square(jax.lax.stop_gradient(dense)).sum(k_axes)
            gain = self.magnitude / lengths(squares)
        if gain is not None:
            dense = dense * jnp.expand_dims(gain, k_axes)
        return dense.astype(dtype or self.dtype)

    def __repr__(self) -> str:
        return f"LoraArray(rank={self.a.shape[-1]}, base={self.base!r})"


def dense_base(base: Any, dtype: Any = None) -> jax.Array:
    """The frozen weight as a dense array of `dtype` (its own by default)."""
    if isinstance(base, QuantizedArray):
        return base.dequantize(dtype)
    return jnp.asarray(base, dtype)


def lengths(squares: jax.Array) -> jax.Array:
    """Roots of sums of squares; never zero, so that a column of zeros may be divided by its own."""
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


def apart(weight: Any) -> tuple[Any, dict[str, Any]]:
    """(the weight without its shared fields, those): only the rest has the stacked axes."""
    shared = {name: getattr(weight, name) for name in getattr(weight, "SHARED", ())}
    return (dataclasses.replace(weight, **dict.fromkeys(shared)) if shared else weight), shared


def together(weight: Any, fields: dict[str, Any]) -> Any:
    """The weight with those fields, such as what `apart` took out of it."""
    return dataclasses.replace(weight, **fields) if fields else weight


def map_stacked(fn: Callable[[Any], Any], weight: Any) -> Any:
    """The weight with `fn` done to every leaf that has the stacked axes."""
    stacked, shared = apart(weight)
    return together(jax.tree.map(fn, stacked), shared)


def trained_part(weight: Any) -> dict[str, Any]:
    """The fields of a weight that have gradients, by name; none if it is frozen."""
    fields = ((name, getattr(weight, name)) for name in getattr(weight, "TRAINED", ()))
    return {name: x for name, x in fields if x is not None}


def cotangent(weight: Any, trained: dict[str, Any]) -> Any:
    """What a custom_vjp returns for a weight, from the gradients of its `trained_part`."""
    if not trained:
        return None
    fields = [f.name for f in dataclasses.fields(weight) if not f.metadata.get("static")]
    return dataclasses.replace(weight, **dict.fromkeys(fields) | trained)


def trained_fields(node: Any) -> Any:
    """The same dataclass with True for every leaf of its TRAINED fields, False for the others."""
    fields = [f.name for f in dataclasses.fields(node) if not f.metadata.get("static")]
    return dataclasses.replace(
        node,
        **{
            name: jax.tree.map(lambda _, name=name: name in node.TRAINED, getattr(node, name))
            for name in fields
        },
    )


def is_weight(x: Any) -> bool:
    """Whether x is one of our weights: the leaves at which trees are cut."""
    return isinstance(x, AdaptedArray | QuantizedArray)


def all_dense(tree: Any) -> bool:
    """Whether the tree holds arrays only: no weight in 4 bits, none with an adapter."""
    return not any(map(is_weight, jax.tree.leaves(tree, is_leaf=is_weight)))
