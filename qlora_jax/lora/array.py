"""LoraArray: a weight with its adapter, standing in a parameter tree where the kernel stood."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.quant import QuantizedArray

Scaling = float | tuple[float, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeights:
    """The trainable part of one adapted weight W [..., *K axes, *N axes].

    a        fp32 [..., *K axes, R]
    b        fp32 [..., R, *N axes]
    scaling  factor on A B; if stacked weights differ (those of an imported adapter may), one for
             each, in the order of their storage
    """

    a: Any
    b: Any
    scaling: Scaling = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """R, the inner size of the product A B."""
        return self.a.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraArray:
    """W + scaling * A B, never formed.

    base         W [..., *K axes, *N axes], dense or QuantizedArray
    a, b         fp32 [..., *K axes, R] and [..., R, *N axes]
    scaling      fp32 [...], one number for each stacked weight
    dropout_key  None, or a key [...] for each stacked weight: inputs of A are dropped with
                 probability `dropout`
    All leaves share the leading axes, so that slicing and scanning work as for any pytree.
    """

    base: Any
    a: Any
    b: Any
    scaling: Any
    dropout_key: Any = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of W: [..., *K axes, *N axes]."""
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
    def k_ndim(self) -> int:
        """How many axes of W are contracted."""
        return self.ndim - self.b.ndim + 1

    @property
    def n_ndim(self) -> int:
        """How many axes of W are outputs."""
        return self.ndim - self.a.ndim + 1

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the stacked axes, which all leaves have in front; () for a single weight."""
        return self.shape[: self.ndim - self.k_ndim - self.n_ndim]

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """A as [..., K, R] and B as [..., R, N]."""
        batch, rank = self.batch_shape, self.a.shape[-1]
        return self.a.reshape(*batch, -1, rank), self.b.reshape(*batch, rank, -1)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """Dense W + scaling * A B [..., *K, *N], summed in fp32 and rounded once."""
        a, b = self.factors()
        low_rank = jnp.einsum("...kr,...rn->...kn", a, b * self.scaling[..., None, None])
        dense = dense_base(self.base, jnp.float32) + low_rank.reshape(self.shape)
        return dense.astype(dtype or self.dtype)

    def __repr__(self) -> str:
        return f"LoraArray(rank={self.a.shape[-1]}, base={self.base!r})"


def dense_base(base: Any, dtype: Any = None) -> jax.Array:
    """The frozen weight as a dense array of `dtype` (its own by default)."""
    if isinstance(base, QuantizedArray):
        return base.dequantize(dtype)
    return jnp.asarray(base, dtype)


def is_weight(x: Any) -> bool:
    """Whether x is one of our weights: the leaves at which trees are cut."""
    return isinstance(x, LoraArray | QuantizedArray)
