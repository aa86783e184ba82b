"""VeRA (arXiv:2310.11454): random matrices that all weights share, and vectors that are trained.

W' = W + A diag(d) B diag(b) for a weight [K, N], A [K, R] and B [R, N] being the first rows and
columns of two frozen matrices as large as the largest adapted weight. As in PEFT these are drawn
from a number alone, by the generator of PyTorch, and a file of an adapter may leave them out.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import QloraError
from qlora_jax.lora.array import AdaptedArray, dense_base
from qlora_jax.lora.config import check_dropout, check_modules, check_rank
from qlora_jax.quant import QuantizedArray

PROJECTIONS = "vera_projections"
"""The entry among adapters that is no parameter's: VeraProjections, for all VeraWeights."""


@dataclasses.dataclass(frozen=True)
class VeraConfig:
    """Vector-based random matrix adaptation (arXiv:2310.11454): W x becomes W x + b * (B (d * A x))
    with A and B random, frozen and shared, and the vectors d and b trained.

    Raises QloraError for a rank that is no integer of at least 1, a dropout outside [0, 1), a
    d_initial that is not finite, and a pattern that is no regular expression.
    """

    rank: int = 256
    """R, the inner size; larger than LoRA's, since it costs R numbers a weight."""
    d_initial: float = 0.1
    """What every d starts from; b starts from zero."""
    dropout: float = 0.0
    """Probability of dropping each input of A while training."""
    targets: str | tuple[str, ...] = "all-linear"
    """What gets an adapter, as in LoraConfig; linear layers only."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full, by their names or ends of them."""
    projection_prng_key: int = 0
    """The number that A and B are drawn from."""
    save_projection: bool = True
    """Whether files of the adapter hold A and B; they can be drawn again."""

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        if not math.isfinite(self.d_initial):
            raise QloraError(f"d_initial must be finite, got {self.d_initial}")
        check_dropout(self.dropout)
        if not 0 <= self.projection_prng_key < 2**64:
            raise QloraError(
                f"projection_prng_key must be in [0, 2^64), got {self.projection_prng_key}"
            )
        check_modules(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VeraProjections:
    """The frozen matrices: a fp32 [largest K, R], b fp32 [R, largest N]."""

    TRAINED: ClassVar = ()

    a: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VeraWeights:
    """The trained vectors of one weight W [..., *K axes, *N axes].

    lambda_d  fp32 [..., R]
    lambda_b  fp32 [..., *N axes]
    """

    TRAINED: ClassVar = ("lambda_d", "lambda_b")

    lambda_d: Any
    lambda_b: Any

    @property
    def rank(self) -> int:
        """R, the inner size of the product A B."""
        return self.lambda_d.shape[-1]

    def on(
        self, base: Any, projections: VeraProjections, dropout_key: Any, dropout: float
    ) -> "VeraArray":
        """`base` with this adapter; dropout_key: one for each stacked weight."""
        batch = self.lambda_d.ndim - 1
        n_ndim = self.lambda_b.ndim - batch
        k = math.prod(base.shape[batch : base.ndim - n_ndim])
        n = math.prod(base.shape[base.ndim - n_ndim :])
        a, b = projections.a[:k], projections.b[:, :n]
        return VeraArray(base, a, b, self.lambda_d, self.lambda_b, dropout_key, dropout)

    def misfit(self, leaf: Any, projections: VeraProjections | None) -> str | None:
        """What keeps it from being the adapter of the weight `leaf`; None if nothing does."""
        if projections is None:
            return f"a VeRA adapter without {PROJECTIONS}"
        shape, d, b = tuple(leaf.shape), tuple(self.lambda_d.shape), tuple(self.lambda_b.shape)
        batch = len(d) - 1
        n_shape = b[batch:]
        k_shape = shape[batch : len(shape) - len(n_shape)]
        fits = bool(k_shape and n_shape) and shape == (*d[:-1], *k_shape, *n_shape)
        fits = fits and b[:batch] == d[:-1]
        if isinstance(leaf, QuantizedArray):
            fits = fits and (leaf.k_shape, leaf.n_shape) == (k_shape, n_shape)
        if not fits:
            return f"lambda_d {d} and lambda_b {b} do not fit the parameter's {shape}"
        k, n = math.prod(k_shape), math.prod(n_shape)
        (rows, rank), (rank_b, columns) = projections.a.shape, projections.b.shape
        if not rank == rank_b == d[-1]:
            return f"rank {d[-1]}, but the projections have {rank} and {rank_b}"
        if rows < k or columns < n:
            return f"projections for {rows} x {columns}, the weight is {k} x {n}"
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VeraArray(AdaptedArray):
    """W + A diag(lambda_d) B diag(lambda_b), never formed.

    base          W [..., *K axes, *N axes], dense or QuantizedArray
    a, b          fp32 [K, R] and [R, N], the same for all stacked weights
    lambda_d      fp32 [..., R]
    lambda_b      fp32 [..., *N axes]
    dropout_key   as in LoraArray
    """

    TRAINED: ClassVar = ("lambda_d", "lambda_b")
    SHARED: ClassVar = ("a", "b")

    base: Any
    a: Any
    b: Any
    lambda_d: Any
    lambda_b: Any
    dropout_key: Any = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def k_ndim(self) -> int:
        return self.ndim - self.lambda_b.ndim

    @property
    def n_ndim(self) -> int:
        return self.lambda_b.ndim - self.lambda_d.ndim + 1

    def factors(self) -> tuple[jax.Array, jax.Array]:
        return self.a, self.b

    def dequantize(self, dtype: Any = None) -> jax.Array:
        outputs = self.lambda_b.reshape(*self.batch_shape, 1, -1)
        low_rank = jnp.einsum("kr,...r,rn->...kn", self.a, self.lambda_d, self.b) * outputs
        dense = dense_base(self.base, jnp.float32) + low_rank.reshape(self.shape)
        return dense.astype(dtype or self.dtype)

    def __repr__(self) -> str:
        return f"VeraArray(rank={self.lambda_d.shape[-1]}, base={self.base!r})"


def fresh(config: VeraConfig, shapes: Mapping[str, tuple[tuple[int, ...], ...]]) -> dict[str, Any]:
    """New adapters. shapes: path -> (leading axes, contracted axes, output axes).

    Raises QloraError for an embedding: VeRA is of linear layers.
    """
    if tables := [path for path in shapes if path.endswith("embedding")]:
        raise QloraError(f"VeRA is of linear layers only, not of {', '.join(tables)}")
    adapters: dict[str, Any] = {
        path: VeraWeights(
            jnp.full((*batch, config.rank), config.d_initial, jnp.float32),
            jnp.zeros((*batch, *n_shape), jnp.float32),
        )
        for path, (batch, _, n_shape) in shapes.items()
    }
    if adapters:
        k = max(math.prod(k_shape) for _, k_shape, _ in shapes.values())
        n = max(math.prod(n_shape) for _, _, n_shape in shapes.values())
        adapters[PROJECTIONS] = draw_projections(config.projection_prng_key, k, n, config.rank)
    return adapters


def draw_projections(number: int, k: int, n: int, rank: int) -> VeraProjections:
    """A and B from a number, as torch.Generator().manual_seed(number) draws them for PEFT.

    Kaiming-uniform for a gain of sqrt(2): U(-sqrt(6 / inputs), sqrt(6 / inputs)), of A [R, K] and
    then of B [N, R] in PyTorch's order of axes.
    """
    generator = np.random.RandomState(number & 0xFFFFFFFF)  # PyTorch's takes 32 bits too

    def uniform(shape: tuple[int, int], inputs: int) -> np.ndarray:
        # PyTorch makes a float of the lower 24 of 32 random bits, and multiplies and adds at once.
        bits = generator.randint(0, 2**32, shape, np.uint32) & np.uint32(0xFFFFFF)
        bound = np.float64(np.float32(math.sqrt(6.0 / inputs)))
        return (bits * (2.0**-24 * 2.0 * bound) - bound).astype(np.float32)

    a = uniform((rank, k), k)
    b = uniform((n, rank), rank)
    return VeraProjections(jnp.asarray(a.T), jnp.asarray(b.T))
