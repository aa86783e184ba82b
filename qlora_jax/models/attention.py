"""Grouped-query attention with rotary positions, and which code computes it."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import QloraError
from qlora_jax.models import attention_cudnn, attention_splash, attention_xla
from qlora_jax.models.masks import Mask
from qlora_jax.models.rope import rotate

AttentionImplementation = Literal["xla", "splash", "cudnn"]


class Attention(nnx.Module):
    """q, k, v, o projections around `attend`; qk_norm: q and k are normalized before rotation."""

    def __init__(
        self,
        config: Any,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: Any = None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """config: a DecoderConfig; qk_norm: makes the two norms, which are over a head."""
        linear = functools.partial(
            nnx.Linear,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        width = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = linear(width, queries, use_bias=qkv_bias)
        self.k_proj = linear(width, keys, use_bias=qkv_bias)
        self.v_proj = linear(width, keys, use_bias=qkv_bias)
        self.o_proj = linear(queries, width, use_bias=o_bias)
        self.qk_norm = qk_norm is not None
        if qk_norm is not None:
            self.q_norm, self.k_norm = qk_norm(), qk_norm()

    def project(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> q [B, T, H, Dh], k and v [B, T, Hkv, Dh], q and k rotated."""
        split = (*x.shape[:2], -1, self.head_dim)
        q, k = self.q_proj(x).reshape(split), self.k_proj(x).reshape(split)
        v = self.v_proj(x).reshape(split)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> jax.Array:
        """q [B, T, H, Dh] over k, v [B, S, Hkv, Dh] -> [B, T, D]; the rest as for `attend`."""
        out = attend(q, k, v, mask, scale=scale, softcap=softcap)
        return self.o_proj(out.reshape(*out.shape[:2], -1))


class Kernel(NamedTuple):
    """A flash attention: `attend` as below, the only platform on which it runs, why it does not on
    this machine (None: it does), why it does not take such a q, k, mask and softcap, and whether
    it takes so much memory for such a q and mask that it has to be named."""

    attend: Callable[..., jax.Array]
    platform: str
    unavailable: Callable[[], str | None]
    unsupported: Callable[[jax.Array, jax.Array, Mask, float | None], str | None]
    wasteful: Callable[[jax.Array, Mask], bool] = lambda *_: False


KERNELS: dict[AttentionImplementation, Kernel] = {
    "splash": Kernel(
        attention_splash.attend,
        "tpu",
        attention_splash.unavailable,
        attention_splash.unsupported,
    ),
    "cudnn": Kernel(
        attention_cudnn.attend,
        "cuda",
        attention_cudnn.unavailable,
        attention_cudnn.unsupported,
        attention_cudnn.wasteful,
    ),
}
assert {"xla", *KERNELS} == set(get_args(AttentionImplementation))

_forced: contextvars.ContextVar[AttentionImplementation | None] = contextvars.ContextVar(
    "attention", default=None
)


@contextlib.contextmanager
def use_attention(implementation: AttentionImplementation | None) -> Iterator[None]:
    """Sequences that attend to themselves do so by `implementation` in all that is traced inside.

    None: as the platform decides. A name holds also for devices that are not here, as when
    compiling without one; what it does not take raises QloraError. A function that jit has compiled
    before keeps what it was compiled with.
    """
    if implementation not in (None, *get_args(AttentionImplementation)):
        expected = ", ".join(get_args(AttentionImplementation))
        raise QloraError(f"attention {implementation!r}: expected one of {expected}")
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


def kernels_here() -> list[AttentionImplementation]:
    """Those that run on this machine."""
    return [name for name, kernel in KERNELS.items() if not kernel.unavailable()]


def choose(
    q: Any, k: Any, mask: Mask, softcap: float | None, kernels: Collection[AttentionImplementation]
) -> AttentionImplementation:
    """Which code computes it where those kernels run, if none is named; q, k: arrays or shapes."""
    for name in kernels:
        kernel = KERNELS[name]
        if not kernel.unsupported(q, k, mask, softcap) and not kernel.wasteful(q, mask):
            return name
    return "xla"


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """q [B, T, H, Dh] over k, v [B, S, Hkv, Dh] -> [B, T, H, Dh]; no query sees a later key.

    scale: of the scores, 1 / sqrt(Dh) by default; softcap: scores x become cap * tanh(x / cap).
    What padding attends to is not defined. Computed by the kernel of the platform that the program
    is lowered for, where T = S, there is no cache, and the kernel takes it; else by XLA.
    """
    how = {"scale": scale, "softcap": softcap}
    name = _forced.get()
    if name == "xla" or mask.start is not None or q.shape[1] != k.shape[1]:
        return attention_xla.attend(q, k, v, mask, **how)
    if name is not None:
        if reason := KERNELS[name].unsupported(q, k, mask, softcap):
            raise QloraError(f"attention {name!r} cannot be used: {reason}")
        return KERNELS[name].attend(q, k, v, mask, **how)
    name = choose(q, k, mask, softcap, kernels_here())
    if name == "xla":
        return attention_xla.attend(q, k, v, mask, **how)
    kernel = KERNELS[name]
    here = {kernel.platform: functools.partial(kernel.attend, **how)}

    # What one branch would keep for the backward pass, the others would have to make too; so it is
    # q, k and v alone.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chosen(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        default = functools.partial(attention_xla.attend, **how)
        return jax.lax.platform_dependent(q, k, v, mask, default=default, **here)

    return chosen(q, k, v, mask)
