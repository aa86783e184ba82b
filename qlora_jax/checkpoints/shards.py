"""Tensors written to safetensors as they come, in shards of bounded size."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qlora_jax.checkpoints.tensors import INDEX, SINGLE
from qlora_jax.errors import missing

SHARD_BYTES = 2 * 1024**3
"""Tensors of a shard are held in memory until it is written."""


def write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """model.safetensors in `folder`, or several files and their index if it would be too large."""
    try:
        from safetensors.numpy import save_file
    except ModuleNotFoundError as error:
        raise missing("safetensors", f"writing {folder}", "hf") from error
    shards: list[dict[str, int]] = []
    for shard in _shards(tensors):
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append({key: x.nbytes for key, x in shard.items()})
    _name_shards(folder, shards)


def _shards(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, x in tensors:
        if shard and sum(y.nbytes for y in shard.values()) + x.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = x
    yield shard


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Their final names, which hold the number of shards, and the index if there are several."""
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / name)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(size for shard in shards for size in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
