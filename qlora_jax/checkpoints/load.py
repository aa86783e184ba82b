"""`load`: from a checkpoint on disk or on the hub to a Model, quantizing tensor by tensor."""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.checkpoints import bitsandbytes, peft, quantized, tokenizer
from qlora_jax.checkpoints.bitsandbytes import BitsandbytesFolder
from qlora_jax.checkpoints.encoder import EncoderModel
from qlora_jax.checkpoints.gguf import GGUFFile
from qlora_jax.checkpoints.heads import EncoderTensors, HeadRequest
from qlora_jax.checkpoints.hub import download
from qlora_jax.checkpoints.json_files import read_json
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.names import OnTensor, Place, count_tensors, parameters
from qlora_jax.checkpoints.on_disk import OnDisk
from qlora_jax.checkpoints.seq2seq import Seq2SeqModel
from qlora_jax.checkpoints.tensors import SafetensorsFolder, Tensors
from qlora_jax.checkpoints.torch_files import TorchFolder
from qlora_jax.errors import QloraError
from qlora_jax.lora.adapters import named_leaves
from qlora_jax.models import T5Config, family_of, read_config
from qlora_jax.models.config import special_tokens
from qlora_jax.models.encoder_config import EncoderConfig
from qlora_jax.models.typed import entry
from qlora_jax.quant import Policy, QuantConfig, QuantizedArray, quantize

logger = logging.getLogger("qlora_jax.load")


def load(
    source: str | Path,
    *,
    quantization: QuantConfig | None = None,
    dtype: DTypeLike | None = None,
    policy: Policy | None = None,
    on_tensor: OnTensor | None = None,
    head: str | None = None,
    num_labels: int | None = None,
    problem_type: str | None = None,
    seed: int = 0,
    place: Place | None = None,
) -> Any:
    """A `Model`, `Seq2SeqModel` or `EncoderModel`, by its family, its linear weights in 4 bits.

    source        a folder with config.json and safetensors (dense, or in 4 bits by bitsandbytes)
                  or .bin files, a .gguf file, a folder that `save_quantized` wrote, or the name of
                  a model on the Hugging Face hub
    quantization  NF4() or FP4(); None: nothing is quantized here. What is in 4 bits already stays
                  in the format that it is in, and any other is refused
    dtype         of the computation, and what weights that stay dense are cast to: by default
                  fp32 on CPU, bf16 elsewhere; norms stay fp32
    policy        which weights are quantized: by default every linear kernel but the output head
                  and the routers of experts
    on_tensor     called for every tensor that was read, with how many there are in all
    head          of an encoder: "masked-lm" or "classification"; by default the checkpoint's
    num_labels    how many labels its classification has; 1: a regression
    problem_type  of its classification: see `EncoderModel.loss`
    seed          a head that is asked for and not in the checkpoint is drawn from it, which the log
                  says
    place         puts each parameter onto a mesh as it is read (see `parallel.put_parameter`)

    Tensors are read and quantized one after the other: the host never holds more than the result,
    or its part of it, and two tensors, besides what compiling takes (about 100 MB, once). Raises
    QloraError for what cannot be read, with every tensor listed that is missing, surplus, misshapen
    or not of floating-point numbers, and for weights not finite.
    """
    if not isinstance(quantization, QuantConfig | None):
        raise QloraError(f"quantization is {quantization!r}; expected NF4(), FP4() or None")
    request = HeadRequest(head, num_labels, problem_type, seed)
    config, tensors, read_tokenizer, made = _open(source, request)
    dtype = _dtype(dtype)
    if tensors is None:
        folder = locate(source)
        params = quantized.load_params(folder, config, quantization, dtype, place)
        if request:
            config = request.of(config)
            params = _with_head(params, config, request, dtype, str(folder))
        return assemble(config, params, read_tokenizer(), str(source), dtype)
    stored = tensors.inside if isinstance(tensors, EncoderTensors) else tensors
    if isinstance(stored, BitsandbytesFolder):
        stored.check(quantization, policy)
        quantization = None
    tokens = read_tokenizer()
    choose, total = policy or Policy(), count_tensors(config)
    params: dict[str, Any] = {}
    chosen = [
        (p, quantization if choose.selects(p.path, p.shape) else None) for p in parameters(config)
    ]
    # What stays dense comes first: it has the largest tensors, and compiling what quantizes takes
    # memory that is not given back.
    for parameter, use in sorted(chosen, key=lambda pair: pair[1] is not None):
        if parameter.path in made:
            leaf = request.make(parameter, config, dtype)
            leaf = quantize(leaf, use, name=parameter.path) if use else leaf
            leaf = place(config, parameter.path, leaf) if place else leaf
        else:
            on_disk = OnDisk(parameter, tensors, use, dtype, lambda: on_tensor and on_tensor(total))
            if place is not None:
                placed = functools.partial(place, config, parameter.path)
                on_disk = dataclasses.replace(on_disk, placed=placed)
            leaf = on_disk.read()
        _put(params, parameter.path, leaf)
    return assemble(config, params, tokens, str(source), dtype)


def assemble(config: Any, *fields: Any) -> Any:
    """The kind of model that the configuration is of, with the fields of `Model` after it."""
    if isinstance(config, EncoderConfig):
        return EncoderModel(config, *fields)
    return Seq2SeqModel(config, *fields) if isinstance(config, T5Config) else Model(config, *fields)


def _with_head(
    params: Any, config: Any, request: HeadRequest, dtype: DTypeLike, source: str
) -> dict[str, Any]:
    """The parameters under another head; what it shares with the old one is kept."""
    have = named_leaves(params)
    fits = {p.path: have[p.path].shape == p.shape for p in parameters(config) if p.path in have}
    made = request.to_make(config, fits, source)
    tree: dict[str, Any] = {}
    for parameter in parameters(config):
        new = parameter.path in made
        leaf = request.make(parameter, config, dtype) if new else have[parameter.path]
        _put(tree, parameter.path, leaf)
    return tree


def _fits(config: Any, tensors: Tensors) -> dict[str, bool]:
    """Path -> whether the shape in the file is the one that is wanted, of what is in the file."""
    have = tensors.shapes()
    names = {parameter: tensors.name(parameter, 0) for parameter in parameters(config)}
    return {p.path: have[name] == p.file_shape for p, name in names.items() if name in have}


def load_lazily(source: str | Path, *, quantization: QuantConfig | None = None) -> Any:
    """As `load`, but every leaf of the parameters is an `OnDisk`: to be read, not to compute with.

    Weights have the type that they have there; a folder of `save_quantized` is read as a whole.
    quantization: what linear weights that are dense there become, tensor by tensor.
    """
    config, tensors, read_tokenizer, _ = _open(source, HeadRequest())
    if tensors is None:
        return load(source, quantization=quantization, dtype=jnp.float32)
    choose = Policy()
    params: dict[str, Any] = {}
    for parameter in parameters(config):
        use = quantization if choose.selects(parameter.path, parameter.shape) else None
        _put(params, parameter.path, OnDisk(parameter, tensors, use, None))
    return assemble(config, params, read_tokenizer(), str(source), jnp.float32)


def _open(
    source: str | Path, request: HeadRequest
) -> tuple[Any, Tensors | None, Callable[[], Any], Container[str]]:
    """Configuration, checked tensors, what reads the tokenizer, paths of what has to be made.

    The tensors are None for a folder that `save_quantized` wrote, and the configuration is its own.
    """
    path = locate(source)
    if path.suffix == ".gguf":
        file = GGUFFile(path)
        config = request.of(file.config)
        _check(config, file, ())
        return config, file, functools.partial(tokenizer.from_gguf, file), ()
    config, already = _read_config(path)
    read_tokenizer = functools.partial(tokenizer.from_folder, path)
    if quantized.is_quantized_folder(path):
        return config, None, read_tokenizer, ()
    config = request.of(config)
    tensors = _open_folder(path, config, already)
    config = _with_its_head(config, tensors)
    if isinstance(config, EncoderConfig):
        tensors = EncoderTensors(tensors, config)
    made = request.to_make(config, _fits(config, tensors), tensors.source)
    _check(config, tensors, made)
    return config, tensors, read_tokenizer, made


def is_four_bit(source: str | Path) -> bool:
    """Whether a checkpoint's weights are in 4 bits already; one on the hub is downloaded."""
    path = locate(source)
    if path.is_file():
        return False
    return quantized.is_quantized_folder(path) or _read_config(path)[1] is not None


def _with_its_head(config: Any, tensors: Tensors) -> Any:
    """The configuration of a T5, with its head untied if the file has another one than the table.

    transformers 5 says of every T5 that it is tied, and goes by the tensors as we do here.
    """
    if not isinstance(config, T5Config) or not config.tie_word_embeddings:
        return config
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    table = {parameter.path: parameter for parameter in parameters(untied)}
    both = [table[path] for path in ("shared/embedding", "lm_head/kernel")]
    if not all(tensors.name(parameter, 0) in tensors.shapes() for parameter in both):
        return config
    shared, head = (tensors.read(parameter, 0) for parameter in both)
    if isinstance(shared, QuantizedArray) or isinstance(head, QuantizedArray):
        return untied
    return config if np.array_equal(shared, head) else untied


def _dtype(asked: DTypeLike | None) -> jnp.dtype:
    if asked is None:
        asked = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    try:
        dtype = jnp.dtype(asked)
    except TypeError as error:
        raise QloraError(f"dtype is {asked!r}, which is no type of numbers") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise QloraError(f"dtype is {dtype}; a model computes in floating-point numbers")
    return dtype


def locate(source: str | Path) -> Path:
    """The folder or .gguf file of a checkpoint; one on the hub is downloaded."""
    path = Path(source).expanduser()
    if path.exists():
        if path.is_file() and path.suffix != ".gguf":
            raise QloraError(f"{path}: a file, but no .gguf; give the folder of the checkpoint")
        return path
    return download(str(source))


def _read_config(folder: Path) -> tuple[Any, Mapping[str, Any] | None]:
    """The configuration, and how the weights are quantized already, if they are."""
    try:
        _refuse_adapter(folder)
        about = read_json(folder / "config.json")
        already = entry(about, "quantization_config", Mapping)
        if already and (method := already.get("quant_method")) != bitsandbytes.METHOD:
            raise QloraError(
                f"the checkpoint is already quantized ({method}); give a dense one, or one of "
                "bitsandbytes in 4 bits"
            )
        config = read_config(about)
        if (kind := about["model_type"]) != config.model_type:
            logger.warning(
                "%s: a %s, of which the text model is read, a %s", folder, kind, config.model_type
            )
        return _with_ends(config, folder), already
    except QloraError as error:
        raise QloraError(f"{folder}: {error}") from error


def _refuse_adapter(folder: Path) -> None:
    """Raises QloraError for the folder of an adapter, without the model that it belongs to."""
    if (folder / "config.json").exists() or not (folder / peft.CONFIG).is_file():
        return
    base = read_json(folder / peft.CONFIG).get("base_model_name_or_path")
    raise QloraError(
        f"an adapter, not a model; load its base{f' {base}' if base else ''}, and give the adapter "
        "beside it (--adapter, or peft.load)"
    )


def _with_ends(config: Any, folder: Path) -> Any:
    """The configuration with all tokens that end an answer: those of chat models' turns are often
    in generation_config.json alone."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    more = special_tokens({"eos_token_id": read_json(path).get("eos_token_id")})["eos_token_id"]
    ends = dict.fromkeys((*config.eos_token_id, *more))
    return dataclasses.replace(config, eos_token_id=tuple(ends))


def _open_folder(folder: Path, config: Any, already: Mapping[str, Any] | None) -> Tensors:
    """Safetensors where there are any; what torch wrote needs torch, and is read all the same."""
    if not any(folder.glob("model*.safetensors*")) and any(folder.glob("pytorch_model*.bin*")):
        if already:
            raise QloraError(f"{folder}: 4-bit weights are read from safetensors only")
        return TorchFolder(folder)
    return BitsandbytesFolder(folder, config, already) if already else SafetensorsFolder(folder)


def _check(config: Any, tensors: Tensors, made: Container[str]) -> None:
    """Names, shapes and types of everything but the paths `made`, before anything is read."""
    have, not_floating = tensors.shapes(), tensors.not_floating()
    faults, expected = [], set()
    for parameter in parameters(config):
        for layer in range(parameter.layers):
            name = tensors.name(parameter, layer)
            expected.add(name)
            if parameter.path in made:
                continue
            if name not in have:
                faults.append(f"{name}: missing")
            elif have[name] != parameter.file_shape:
                faults.append(f"{name}: has shape {have[name]}, expected {parameter.file_shape}")
            elif name in not_floating:
                faults.append(
                    f"{name}: has the type {not_floating[name]}, expected floating-point numbers "
                    "of at least 16 bits"
                )
    unused = family_of(config).unused
    surplus = [
        name
        for name in have
        if name not in expected and not tensors.ignorable(name) and not re.fullmatch(unused, name)
    ]
    faults += [f"{name}: surplus, nothing in a {config.model_type} uses it" for name in surplus]
    if faults:
        raise QloraError(
            f"{tensors.source}: the tensors do not fit the configuration:\n  " + "\n  ".join(faults)
        )


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf
