"""Fingerprints: whether a base, or a data set, is the one that a run began with."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.data import TokenizedDataset
from qlora_jax.quant import path_str


def base_fingerprint(model: AnyModel) -> str:
    """16 hex digits of the architecture and of every bit of the parameters, as held in memory.

    The arrays are summed up where they lie, each in one pass, so that nothing but a few numbers
    leaves the device. How they are split over devices makes no difference. It finds out mistakes;
    it is no defence against a base that was made to have the same.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(model.params)
    sums = jax.device_get(_checksums([leaf for _, leaf in leaves]))
    digest = hashlib.sha256(repr(model.config).encode())
    for (path, leaf), total in zip(leaves, sums, strict=True):
        digest.update(f"{path_str(path)} {leaf.shape} {leaf.dtype} {total.tolist()}\n".encode())
    return digest.hexdigest()[:16]


def data_fingerprint(dataset: TokenizedDataset) -> str:
    """16 hex digits of all tokens and labels, in their order, and of how examples are mixed."""
    digest = hashlib.sha256(f"{len(dataset)} {dataset.pad_id} {dataset.parts}".encode())
    for example in dataset:
        for name, value in vars(example).items():
            if isinstance(value, np.ndarray):
                digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
                digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()[:16]


@jax.jit
def _checksums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(x) for x in arrays]


def _checksum(x: jax.Array) -> jax.Array:
    """uint32 [2]: two sums, modulo 2^32 and so in whatever order, over scrambled (bits, place)."""
    bits = min(x.dtype.itemsize * 8, 32)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    first = _scrambled(words ^ _scrambled(place))
    second = _scrambled(first ^ jnp.uint32(0x9E3779B9))
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


def _scrambled(x: Any) -> Any:
    """The finalizer of MurmurHash3 (Austin Appleby, public domain): each bit of x moves half of the
    result's."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
