"""A quantized model on disk, so that quantizing is done once: Orbax for the 4-bit tree."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qlora_jax.checkpoints.export import save_config, save_tokenizer
from qlora_jax.checkpoints.folder import new_folder
from qlora_jax.checkpoints.json_files import read_json
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.names import Place
from qlora_jax.errors import QloraError, reason
from qlora_jax.lora.tree import named_leaves
from qlora_jax.models import abstract_params
from qlora_jax.models.typed import checked, needed
from qlora_jax.quant import QuantConfig, QuantizedArray, path_str, quantize

DESCRIPTION = "quantization.json"
VERSION = 1


def save_quantized(folder: str | Path, model: Model) -> None:
    """`model` as it is in memory; `load(folder)` brings it back without quantizing anew.

    Writes config.json, the tokenizer, quantization.json (the format, and which weights have it)
    and params/, an Orbax checkpoint. Raises QloraError if `folder` is there and not empty, or if
    nothing in the model is quantized.
    """
    leaves = named_leaves(model.params)
    quantized = {path: x for path, x in leaves.items() if isinstance(x, QuantizedArray)}
    formats = {QuantConfig(x.codebook, x.block_size, x.double_quant) for x in quantized.values()}
    if len(formats) != 1:
        raise QloraError(f"{folder}: the model has {len(formats)} 4-bit formats in it, not one")
    description = {
        "version": VERSION,
        **dataclasses.asdict(formats.pop()),
        "parameters": {path: jnp.dtype(x.dtype).name for path, x in quantized.items()},
    }
    import orbax.checkpoint as ocp

    with new_folder(Path(folder).expanduser().absolute()) as part:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(part / "params", model.params)
        save_config(part, model, model.dtype)
        save_tokenizer(part, model)
        description["files"] = _sizes(part / "params")
        (part / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def is_quantized_folder(folder: Path) -> bool:
    """Whether `save_quantized` wrote it."""
    return (folder / DESCRIPTION).is_file()


def stored_format(folder: Path) -> QuantConfig:
    """The 4-bit format of the weights in a folder that `save_quantized` wrote."""
    return _description(folder)[0]


def load_params(
    folder: Path,
    config: Any,
    asked: QuantConfig | None,
    dtype: DTypeLike,
    place: Place | None = None,
) -> Any:
    """The parameter tree in `folder`, dense weights as `dtype`. place: as for `load`; of each array
    only what belongs to this process's devices is read.

    Raises QloraError if `asked` is another format than the stored one, and for a folder that is
    damaged or put together of parts that do not belong to each other.
    """
    stored, dtypes, files = _description(folder)
    if asked is not None and asked != stored:
        raise QloraError(
            f"{folder}: already quantized as {stored}, cannot become {asked}; load it as it is, or "
            "quantize the checkpoint that it was made of"
        )

    def abstract(path: Any, leaf: Any) -> Any:
        name = path_str(path)
        if name in dtypes:
            leaf = quantize(jax.ShapeDtypeStruct(leaf.shape, dtypes[name]), stored)
        else:
            kept = jnp.float32 if name.endswith("/scale") else dtype
            leaf = jax.ShapeDtypeStruct(leaf.shape, kept)
        return place(config, name, leaf) if place else leaf

    target = jax.tree_util.tree_map_with_path(abstract, abstract_params(config))
    where = (folder / "params").absolute()
    _whole(where, files)
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            _compare(checkpointer.metadata(where).item_metadata.tree, target)
            return checkpointer.restore(where, target)
    # Orbax and TensorStore raise whatever is nearest, for a file cut short a bare Exception.
    except Exception as error:
        raise QloraError(
            f"{folder / 'params'}: cannot be read as the weights that config.json and "
            f"{DESCRIPTION} describe ({reason(error)}); write the folder anew with save_quantized"
        ) from error


def _sizes(where: Path) -> dict[str, int]:
    """The bytes of every file below `where`, by its path from there."""
    paths = (path for path in sorted(where.rglob("*")) if path.is_file())
    return {path.relative_to(where).as_posix(): path.stat().st_size for path in paths}


def _whole(where: Path, files: Mapping[str, int]) -> None:
    """Raises QloraError, naming the first, for files that are missing or cut short.

    Orbax would find out in the middle of reading, and leave the other reads behind with errors.
    """
    have = _sizes(where)
    odd = [name for name, size in files.items() if have.get(name) != size]
    if odd:
        raise QloraError(
            f"{where / odd[0]}: {have.get(odd[0], 'no')} bytes, expected {files[odd[0]]} (so for "
            f"{len(odd)} of {len(files)} files); copy the folder again, or write it anew with "
            "save_quantized"
        )


def _compare(stored: Any, target: Any) -> None:
    """Raises QloraError, naming the first, if arrays have other shapes than they should."""
    have, want = (
        {path_str(path): tuple(leaf.shape) for path, leaf in flat}
        for flat, _ in map(jax.tree_util.tree_flatten_with_path, (stored, target))
    )
    odd = [name for name in sorted(have | want) if have.get(name) != want.get(name)]
    if odd:
        name = odd[0]
        raise QloraError(
            f"{len(odd)} arrays do not fit, the first being {name}: it has the shape "
            f"{have.get(name)}, expected {want.get(name)}"
        )


def _description(folder: Path) -> tuple[QuantConfig, dict[str, jnp.dtype], dict[str, int]]:
    """The format, the type of the original of every weight that is in it, the files' bytes."""
    path = folder / DESCRIPTION
    about = read_json(path)
    if about.get("version") != VERSION:
        raise QloraError(f"{path}: version {about.get('version')}, not {VERSION}")
    try:
        codebook: Any = needed(about, "codebook", str)  # which QuantConfig checks
        stored = QuantConfig(
            codebook, needed(about, "block_size", int), needed(about, "double_quant", bool)
        )
        listed = needed(about, "parameters", Mapping)
        dtypes = {name: jnp.dtype(checked(name, x, str)) for name, x in listed.items()}
        sizes = needed(about, "files", Mapping)
        files = {name: checked(name, x, int) for name, x in sizes.items()}
    except (QloraError, TypeError) as error:
        raise QloraError(f"{path}: {error}; write the folder anew with save_quantized") from error
    return stored, dtypes, files
