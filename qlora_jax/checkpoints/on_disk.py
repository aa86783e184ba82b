"""A leaf of the parameter tree that is still in its file."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from qlora_jax.checkpoints.names import Parameter
from qlora_jax.checkpoints.tensors import Tensors, fault_of
from qlora_jax.errors import QloraError
from qlora_jax.quant import QuantConfig, QuantizedArray, quantize


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """A leaf of the parameter tree in its file: `read()` is all of it, `leaf[p.at(i)]` a layer.

    quantization: what a layer becomes on the way, None: what it is, of `dtype` if it is dense, or,
    without one, of its own: then layers are NumPy arrays, read-only if they are mapped, and are not
    stacked. Norm scales, which take little room, are fp32. told: called after every layer. placed:
    puts a layer where it is to lie, over several devices if it has a sharding.
    """

    parameter: Parameter
    tensors: Tensors
    quantization: QuantConfig | None
    dtype: DTypeLike | None
    told: Callable[[], Any] = lambda: None
    placed: Callable[[Any], Any] = lambda leaf: leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def abstract(self) -> Any:
        """What `read` would give, without its numbers; a type that only the file knows is fp32."""
        leaf = jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype or jnp.float32))
        return quantize(leaf, self.quantization) if self.quantization else leaf

    def __getitem__(self, at: tuple[int, ...]) -> Any:
        parameter, quantization = self.parameter, self.quantization
        layer = int(np.ravel_multi_index(at, parameter.stack)) if at else 0
        name = self.tensors.name(parameter, layer)
        read = self.tensors.read(parameter, layer)
        self.told()
        if isinstance(read, QuantizedArray):
            return jax.tree.map(jnp.asarray, read)
        if quantization is not None:
            x = _to_quantize(read, parameter.transposed)
            # Waited for: x may be the file itself, which others may write to afterwards.
            return jax.block_until_ready(quantize(x, quantization, name=name))
        kept = jnp.float32 if parameter.path.endswith("/scale") else self.dtype
        if self.dtype is None:
            x = parameter.to_file(read).astype(kept or read.dtype, copy=False)
        else:
            x = _ours(read, parameter.transposed, kept)
        if fault := fault_of(x):
            raise QloraError(f"{name}: {fault}; check the checkpoint, or try a wider dtype")
        return x

    def read(self) -> Any:
        """All layers, written into place one by one."""
        parameter, stack = self.parameter, self.parameter.stack
        first = self.placed(self[parameter.at(0)])
        if not stack:
            return first
        whole = jax.tree.map(lambda leaf: _room(stack, leaf), first)
        whole = _write(whole, first, parameter.at(0))
        del first
        for layer in range(1, parameter.layers):
            # Without a name, so that it is gone before the next one is read.
            whole = _write(whole, self.placed(self[parameter.at(layer)]), parameter.at(layer))
        return whole


def _room(stack: tuple[int, ...], leaf: jax.Array) -> jax.Array:
    """Zeros for a stack of leaves, split over devices as each of them is."""
    shape, sharding = (*stack, *leaf.shape), leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return jnp.zeros(shape, leaf.dtype)
    spec = PartitionSpec(*(None,) * len(stack), *sharding.spec)
    make = functools.partial(jnp.zeros, shape, leaf.dtype)
    return jax.jit(make, out_shardings=NamedSharding(sharding.mesh, spec))()


def _to_quantize(x: np.ndarray, transpose: bool) -> jax.Array:
    """x, transposed, on the device; on a CPU it may be the mapped file itself."""
    if jax.default_backend() != "cpu":
        return _ours(x, transpose, None)
    # A compiled transpose would get a copy of x first, unless that lies at a multiple of 64 bytes.
    return jax.device_put(x.T if transpose else x)


# Compiled, so that neither a second copy nor a mask of the tensor's size is made on the way.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _ours(x: jax.Array, transpose: bool, dtype: DTypeLike | None) -> jax.Array:
    return (x.T if transpose else x).astype(dtype or x.dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: Any, part: Any, at: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda w, p: w.at[at].set(p), whole, part)
