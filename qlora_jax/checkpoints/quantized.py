"""A quantized model on disk, so that quantizing is done once: Orbax for the 4-bit tree."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qlora_jax.checkpoints.export import save_config, save_tokenizer
from qlora_jax.checkpoints.folder import new_folder
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.tensors import read_json
from qlora_jax.errors import QloraError
from qlora_jax.lora.adapters import named_leaves
from qlora_jax.models import LlamaConfig, llama
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

    with new_folder(Path(folder).absolute()) as part:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(part / "params", model.params)
        save_config(part, model, model.dtype)
        save_tokenizer(part, model)
        (part / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def is_quantized_folder(folder: Path) -> bool:
    """Whether `save_quantized` wrote it."""
    return (folder / DESCRIPTION).is_file()


def load_params(
    folder: Path, config: LlamaConfig, asked: QuantConfig | None, dtype: DTypeLike
) -> Any:
    """The parameter tree in `folder`, dense weights as `dtype`.

    Raises QloraError if `asked` is another format than the stored one.
    """
    about = read_json(folder / DESCRIPTION)
    if about.get("version") != VERSION:
        raise QloraError(f"{folder / DESCRIPTION}: version {about.get('version')}, not {VERSION}")
    stored = QuantConfig(about["codebook"], about["block_size"], about["double_quant"])
    if asked is not None and asked != stored:
        raise QloraError(f"{folder}: already quantized as {stored}, cannot become {asked}")
    dtypes = about["parameters"]

    def abstract(path: Any, leaf: Any) -> Any:
        name = path_str(path)
        if name in dtypes:
            return quantize(jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtypes[name])), stored)
        kept = jnp.float32 if name.endswith("/scale") else dtype
        return jax.ShapeDtypeStruct(leaf.shape, kept)

    target = jax.tree_util.tree_map_with_path(abstract, llama.abstract_params(config))
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / "params").absolute(), target)
