"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, both ways."""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.folder import new_file
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.names import Parameter, parameters
from qlora_jax.checkpoints.peft_experts import fused_settings, setting, split_experts
from qlora_jax.checkpoints.peft_names import is_inside, target_names, whole_modules
from qlora_jax.checkpoints.tensors import fault_of, open_safetensors, read_json
from qlora_jax.checkpoints.torch_files import load_tensors, to_numpy
from qlora_jax.errors import QloraError, missing
from qlora_jax.lora import Adapters, LoraConfig, LoraWeights
from qlora_jax.lora.adapters import named_leaves
from qlora_jax.lora.targets import module_name
from qlora_jax.models import Family, family_of
from qlora_jax.models.encoder_config import MASKED_LM
from qlora_jax.models.typed import checked, entry, needed
from qlora_jax.quant import QuantizedArray, path_str

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
"""What torch.save wrote; read where torch is installed and there are no safetensors."""
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.(?P<what>lora_A\.weight|lora_B\.weight|lora_embedding_[AB])")
# What PEFT can do to a LoRA that we cannot; its value where it does nothing.
_UNSUPPORTED = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
}


def save(
    folder: str | Path, adapters: Adapters, model: Model, config: LoraConfig | None = None
) -> None:
    """Writes `adapters` of `model` as PEFT does; PEFT loads them onto the same base model.

    Rank and alpha come from the adapters; `config`, the one they were made by, adds dropout and
    rsLoRA. An adapter already in `folder` is replaced. Raises QloraError, before anything is
    written, for a path that the model lacks and for numbers that are not finite.
    """
    try:
        from safetensors.numpy import save_file
    except ModuleNotFoundError as error:
        raise missing("safetensors", f"writing {folder}", "hf") from error
    table = {parameter.path: parameter for parameter in parameters(model.config)}
    strangers = [path for path in adapters if path not in table]
    if strangers:
        raise QloraError(f"the model has no parameters {strangers}")
    _refuse_tied_words(adapters, model)
    flat, _ = jax.tree_util.tree_flatten_with_path(adapters)
    if faults := [f"{path_str(at)}: {fault}" for at, x in flat if (fault := fault_of(x))]:
        raise QloraError(
            f"{folder}: nothing was written, the adapters are not whole:\n  " + "\n  ".join(faults)
        )
    if _EMBEDDING in adapters and model.config.tie_word_embeddings and not _ties_head(model):
        raise QloraError(
            f"{folder}: nothing was written, the adapter of {table[_EMBEDDING].hf_module} is also "
            "of the head tied to it, which PEFT cannot express for a module of this name"
        )
    tensors = {_PREFIX + name: x for name, x in _tensors(adapters, table, model)}
    if model.config.tie_word_embeddings and _EMBEDDING in table:
        tensors |= _tied_head(tensors, family_of(model.config))
    description = _describe(adapters, table, model, config or LoraConfig())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with new_file(folder / CONFIG) as part:
        part.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _tensors(
    adapters: Adapters, table: Mapping[str, Parameter], model: Model
) -> Iterator[tuple[str, np.ndarray]]:
    full = {p.hf_module for p in table.values() if _is_full(adapters.get(p.path))}
    frozen = named_leaves(model.params)
    for path, parameter in table.items():
        adapter = adapters.get(path)
        if adapter is None and parameter.hf_module in full:
            adapter = frozen[path]  # PEFT stores whole modules: a bias too that was not trained
        if adapter is None:
            continue
        for layer in _layers(parameter, adapter):
            at = parameter.at(layer)
            if not isinstance(adapter, LoraWeights):
                yield parameter.hf_name(layer), _contiguous(parameter.to_file(adapter[at]))
                continue
            names = _factor_names(parameter)
            module = parameter.module(layer)
            yield f"{module}.{names[0]}", _contiguous(adapter.a[at].T)
            yield f"{module}.{names[1]}", _contiguous(adapter.b[at].T)


_EMBEDDING = "embed_tokens/embedding"


def _ties_head(model: Model) -> bool:
    """Whether PEFT ties to the head what is added to the embedding; it goes by this name alone."""
    return family_of(model.config).names["embed_tokens"].endswith("embed_tokens")


# What PEFT stores of a tied head, and of which tensor of the embedding it is the transpose.
_TIED = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}


def _tied_head(tensors: Mapping[str, np.ndarray], family: Family) -> dict[str, np.ndarray]:
    """The head's tensors, which under ensure_weight_tying repeat those of the embedding."""
    table, head = (f"{_PREFIX}{family.names[m]}." for m in ("embed_tokens", "lm_head"))
    out = {
        head + ours: np.ascontiguousarray(tensors[table + theirs].T)
        for ours, theirs in _TIED.items()
        if table + theirs in tensors
    }
    if f"{table}weight" in tensors:
        out[f"{head}weight"] = tensors[f"{table}weight"].copy()
    return out


def _refuse_tied_words(adapters: Adapters, model: Any) -> None:
    """Raises QloraError for an adapter of the table that an encoder predicts masked words by.

    Here it is added to the head as well; what PEFT stores is of the embedding alone.
    """
    words = "embeddings/word_embeddings/embedding"
    if words in adapters and getattr(model.config, "head", None) == MASKED_LM:
        raise QloraError(
            f"{words}: the masked-lm head is tied to it, and PEFT keeps an adapter of the one "
            "apart from the other; leave it out of the targets"
        )


def _layers(parameter: Parameter, adapter: Any) -> list[int]:
    """The layers that are written. `load` gives those without an adapter a scaling of zero."""
    layers = range(parameter.layers)
    if isinstance(adapter, LoraWeights) and isinstance(adapter.scaling, tuple):
        return [layer for layer in layers if adapter.scaling[layer]]
    return list(layers)


def _is_full(adapter: Any) -> bool:
    return adapter is not None and not isinstance(adapter, LoraWeights)


def _factor_names(parameter: Parameter) -> tuple[str, str]:
    if parameter.kernel:
        return "lora_A.weight", "lora_B.weight"
    return "lora_embedding_A", "lora_embedding_B"


def _contiguous(x: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x, np.float32))


def _describe(
    adapters: Adapters, table: Mapping[str, Parameter], model: Model, config: LoraConfig
) -> dict[str, Any]:
    """adapter_config.json: the commonest rank and alpha, and patterns for the others."""
    settings: dict[str, tuple[int, float]] = {}
    for path, adapter in adapters.items():
        if not isinstance(adapter, LoraWeights):
            continue
        divisor = math.sqrt(adapter.rank) if config.rslora else adapter.rank
        module = table[path].hf_module
        if isinstance(adapter.scaling, tuple):
            for layer in _layers(table[path], adapter):
                alpha = _number(adapter.scaling[layer] * divisor)
                settings[table[path].module(layer)] = (adapter.rank, alpha)
        else:
            name = module.rpartition("{}.")[2]
            settings[name] = (adapter.rank, _number(adapter.scaling * divisor))
    usual = collections.Counter(settings.values()).most_common(1)
    rank, alpha = usual[0][0] if usual else (config.rank, config.alpha)
    # These are always said, since PEFT would not take the usual ones for them.
    fused = fused_settings(adapters, rslora=config.rslora)
    settings |= {name: (r, _number(a)) for name, (r, a) in fused.items()}
    full = {table[p].hf_module for p, adapter in adapters.items() if _is_full(adapter)}
    whole = whole_modules(full, table.values())
    adapted = (
        table[path].module(layer)
        for path, adapter in adapters.items()
        if isinstance(adapter, LoraWeights)
        for layer in _layers(table[path], adapter)
    )
    embedded = _EMBEDDING in adapters and model.config.tie_word_embeddings
    return {
        "peft_type": "LORA",
        "task_type": model.task_type,
        "base_model_name_or_path": model.source,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": sorted(target_names(adapted, whole, table.values())),
        "modules_to_save": sorted(whole) or None,
        "rank_pattern": {
            name: r for name, (r, _) in settings.items() if r != rank or name in fused
        },
        "alpha_pattern": {
            name: a for name, (_, a) in settings.items() if a != alpha or name in fused
        },
        # The head of a tied model is the embedding, so what is added to one is added to both.
        "ensure_weight_tying": embedded,
        "bias": "none",
        "use_dora": False,
        # Of transformers' Conv1D, whose weights are [in, out], and of nothing else.
        "fan_in_fan_out": any(
            table[path].kernel and not table[path].transposed for path in adapters
        ),
    }


def _number(x: float) -> float:
    """32, where arithmetic on scaling left 32.000000000000004."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-9, abs_tol=1e-12) else x


def load(folder: str | Path, model: Model) -> tuple[Adapters, LoraConfig]:
    """(adapters, configuration) of a PEFT LoRA in `folder`, to be attached to `model.params`.

    Ranks that differ among the layers are padded with zeros, which stay zero in training. Experts
    may have an adapter each or, by PEFT's target_parameters, one for all of a layer. Raises
    QloraError for what is no LoRA, for a variant that is not supported, and, listing them all, for
    tensors that do not fit the model, are not finite, or are not those that adapter_config.json
    names (target_modules, layers_to_transform, modules_to_save).
    """
    folder = Path(folder)
    about = read_json(folder / CONFIG)
    _check_supported(about, folder / CONFIG, model)
    tensors = _read_tensors(folder)
    family = family_of(model.config)
    tied = "embed_tokens" in family.names and model.config.tie_word_embeddings
    if tied and about.get("ensure_weight_tying"):
        for name, x in _tied_head(tensors, family).items():
            if name in tensors and np.array_equal(tensors[name], x):
                del tensors[name]
    if _texts(about, "target_parameters"):
        table = {parameter.path: parameter for parameter in parameters(model.config)}
        try:
            tensors, about = split_experts(tensors, about, table)
        except QloraError as error:
            raise QloraError(f"{folder}: {error}") from error
    reading = _Reading(about, model)
    for name, x in sorted(tensors.items()):
        reading.take(name.removeprefix(_PREFIX), x)
    reading.finish(folder)
    _refuse_tied_words(reading.adapters, model)
    try:
        return reading.adapters, reading.config()
    except QloraError as error:
        raise QloraError(f"{folder / CONFIG}: {error}") from error


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    if (folder / WEIGHTS).is_file():
        with open_safetensors(folder / WEIGHTS) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not (folder / OLD_WEIGHTS).is_file():
        raise QloraError(f"{folder}: neither {WEIGHTS} nor {OLD_WEIGHTS} is there")
    return {name: to_numpy(x) for name, x in load_tensors(folder / OLD_WEIGHTS).items()}


def _check_supported(about: Mapping[str, Any], where: Path, model: Model) -> None:
    if about.get("peft_type") != "LORA":
        raise QloraError(
            f"{where}: peft_type is {about.get('peft_type')!r}; only LORA is supported"
        )
    # Where weights are [in, out] in files PEFT sets it, whatever a person has asked for.
    usual = {"fan_in_fan_out"} if family_of(model.config).as_stored else set()
    used = [
        key
        for key, off in _UNSUPPORTED.items()
        if key not in usual and about.get(key, off) not in (off, None)
    ]
    if used:
        settings = ", ".join(f"{key}={about[key]!r}" for key in used)
        raise QloraError(f"{where}: not supported: {settings}")
    try:
        _check_types(about)
    except (QloraError, re.error) as error:
        raise QloraError(f"{where}: {error}") from error


def _check_types(about: Mapping[str, Any]) -> None:
    """Everything that is used below, so that it may be used without asking again."""
    needed(about, "r", int)
    needed(about, "lora_alpha", float)
    entry(about, "lora_dropout", float)
    entry(about, "use_rslora", bool)
    entry(about, "ensure_weight_tying", bool)
    for key, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        for pattern, value in entry(about, key, Mapping, {}).items():
            re.compile(pattern)
            checked(f"{key}[{pattern!r}]", value, kind)
    for name, rank in {"r": about["r"], **(about.get("rank_pattern") or {})}.items():
        if rank < 1:
            raise QloraError(f"the rank {name} is {rank}, expected at least 1")
    if about.get("target_modules") is None and not about.get("target_parameters"):
        raise QloraError("target_modules is missing; expected a list of names, or a pattern")
    names = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
    for key in (*names, "target_parameters"):
        for name in _texts(about, key):
            re.compile(name)
    layers = about.get("layers_to_transform")
    for layer in layers if isinstance(layers, list) else [layers]:
        if layer is not None:
            checked("layers_to_transform", layer, int)


def _texts(about: Mapping[str, Any], key: str) -> list[str]:
    """A list of text, which may also stand alone."""
    value = about.get(key)
    if value is None or isinstance(value, str):
        return [value] if value else []
    return [checked(key, name, str) for name in checked(key, value, list)]


def _is_target(about: Mapping[str, Any], module: str, parameter: Parameter) -> bool:
    """PEFT's rule (tuners_utils.check_target_module_exists): whether `module` has factors."""
    excluded = about.get("exclude_modules")
    if excluded and _names_it(excluded, module):
        return False
    # What is trained in full, or lies inside of it, has no factors.
    if any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in _texts(about, "modules_to_save")):
        return False
    targets = about["target_modules"]
    if targets == "all-linear":
        return parameter.kernel and module != "lm_head"
    if isinstance(targets, str) or module in targets or not _names_it(targets, module):
        return _names_it(targets, module)
    layers = about.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    names = _texts(about, "layers_pattern") or [r"[^.]*"]
    found = (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module) for name in names)
    number = next((int(match[1]) for match in found if match), None)
    return number in (layers if isinstance(layers, list) else [layers])


def _names_it(names: Any, module: str) -> bool:
    """By PEFT: text is a pattern of the whole name, the texts of a list are ends of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


class _Reading:
    """Tensors of a file collected into adapters, with everything that does not fit."""

    def __init__(self, about: Mapping[str, Any], model: Model) -> None:
        self.about, self.model = about, model
        self.adapters: Adapters = {}
        self.faults: list[str] = []
        self._modules: dict[str, tuple[Parameter, int]] = {}
        self._names: dict[str, tuple[Parameter, int]] = {}
        for parameter in parameters(model.config):
            for layer in range(parameter.layers):
                self._names[parameter.hf_name(layer)] = parameter, layer
                if parameter.path.endswith(("/kernel", "/embedding")):
                    self._modules[parameter.module(layer)] = parameter, layer
        self._factors: dict[Parameter, dict[int, dict[str, np.ndarray]]] = {}
        self._full: dict[Parameter, dict[int, np.ndarray]] = {}

    def take(self, name: str, x: np.ndarray) -> None:
        match = _KEY.fullmatch(name)
        owner = self._modules.get(match["module"]) if match else self._names.get(name)
        if owner is None:
            self.faults.append(f"{name}: the model has no such module")
            return
        if fault := fault_of(x):
            self.faults.append(f"{name}: {fault}")
        parameter, layer = owner
        if match is None:
            self._full.setdefault(parameter, {})[layer] = x
        elif match["what"] not in _factor_names(parameter):
            self.faults.append(f"{name}: not what an adapter of this module is called")
        else:
            factor = "A" if "A" in match["what"].removeprefix("lora_") else "B"
            self._factors.setdefault(parameter, {}).setdefault(layer, {})[factor] = x

    def _compare_with_description(self) -> None:
        """What was taken against what adapter_config.json names: neither more nor less."""
        for module, (parameter, layer) in self._modules.items():
            here = layer in self._factors.get(parameter, {})
            if here != _is_target(self.about, module, parameter):
                self.faults.append(
                    f"{module}: has an adapter, which target_modules or layers_to_transform exclude"
                    if here
                    else f"{module}: missing, an adapter that target_modules names"
                )
        full = _texts(self.about, "modules_to_save")
        for name, (parameter, layer) in self._names.items():
            module = parameter.module(layer)
            named = module.endswith(tuple(full)) or any(is_inside(module, name) for name in full)
            if layer in self._full.get(parameter, {}) or not named:
                continue
            self.faults.append(f"{name}: missing, of a module that modules_to_save names")

    def finish(self, folder: Path) -> None:
        self._compare_with_description()
        for parameter, layers in self._factors.items():
            self._finish_factors(parameter, layers)
        leaves = named_leaves(self.model.params)
        for parameter, layers in self._full.items():
            self._finish_full(parameter, layers, leaves[parameter.path])
        if not self.adapters and not self.faults:
            self.faults.append("no adapter at all in the file")
        if self.faults:
            raise QloraError(
                f"{folder}: the adapter does not fit the model:\n  " + "\n  ".join(self.faults)
            )

    def _finish_factors(
        self, parameter: Parameter, layers: dict[int, dict[str, np.ndarray]]
    ) -> None:
        # Of a file's [out, in] weight; an embedding is [V, D] in files too, and A is over V.
        k, n = parameter.shape[len(parameter.stack) :]
        before = len(self.faults)
        ranks: dict[int, int] = {}
        for layer, factors in layers.items():
            module = parameter.module(layer)
            if set(factors) != {"A", "B"}:
                self.faults.append(f"{module}: has {'/'.join(sorted(factors))}, needs both A and B")
                continue
            a, b = factors["A"].shape, factors["B"].shape
            rank = setting(self.about, "r", module)
            if a != (rank, k) or b != (n, rank):
                self.faults.append(
                    f"{module}: A {a} and B {b}, expected {(rank, k)} and {(n, rank)}"
                )
            ranks[layer] = int(rank)
        if len(self.faults) > before:
            return
        if parameter.path == _EMBEDDING and self._head_apart():
            self.faults.append(
                f"{parameter.hf_module}: the model's head is tied to its embedding, but the "
                "adapter is of the embedding alone (trained without ensure_weight_tying)"
            )
        width = max(ranks.values())
        a = np.zeros((parameter.layers, k, width), np.float32)
        b = np.zeros((parameter.layers, width, n), np.float32)
        scaling = [0.0] * parameter.layers
        for layer, factors in layers.items():
            rank = ranks[layer]
            a[layer, :, :rank] = factors["A"].astype(np.float32).T
            b[layer, :rank] = factors["B"].astype(np.float32).T
            alpha = setting(self.about, "lora_alpha", parameter.module(layer))
            root = math.sqrt(rank) if self.about.get("use_rslora") else rank
            scaling[layer] = float(alpha) / root
        same = scaling[0] if len(set(scaling)) == 1 else tuple(scaling)
        a, b = (x.reshape(*parameter.stack, *x.shape[1:]) for x in (a, b))
        self.adapters[parameter.path] = LoraWeights(jnp.asarray(a), jnp.asarray(b), same)

    def _finish_full(self, parameter: Parameter, layers: dict[int, np.ndarray], leaf: Any) -> None:
        before = len(self.faults)
        for layer, x in layers.items():
            if x.shape != parameter.file_shape:
                name = parameter.hf_name(layer)
                self.faults.append(f"{name}: {x.shape}, expected {parameter.file_shape}")
        if lost := set(range(parameter.layers)) - set(layers):
            self.faults.append(f"{parameter.hf_module}: trained in full, but not layers {lost}")
        if isinstance(leaf, QuantizedArray):
            self.faults.append(
                f"{parameter.path}: trained in full but quantized here; load the model with a "
                "quantization policy that excludes it"
            )
        if parameter.path == _EMBEDDING and self._head_apart():
            self.faults.append(
                f"{parameter.hf_module}: trained in full and apart from the head that this model "
                "ties to it"
            )
        if len(self.faults) > before:
            return
        ours = [parameter.to_file(layers[i].astype(np.float32)) for i in range(parameter.layers)]
        whole = np.stack(ours).reshape(parameter.shape)
        self.adapters[parameter.path] = jnp.asarray(whole)

    def _head_apart(self) -> bool:
        if not self.model.config.tie_word_embeddings:
            return False
        return not (self.about.get("ensure_weight_tying") and _ties_head(self.model))

    def config(self) -> LoraConfig:
        """The configuration by which `lora.init` would make such adapters."""
        about, rank, alpha = self.about, self.about["r"], self.about["lora_alpha"]
        low_rank = {
            module_name(path): adapter
            for path, adapter in self.adapters.items()
            if isinstance(adapter, LoraWeights)
        }
        config = LoraConfig(
            rank=rank,
            alpha=alpha,
            dropout=about.get("lora_dropout") or 0.0,
            rslora=about.get("use_rslora") or False,
            targets=tuple(low_rank),
            rank_pattern={n: w.rank for n, w in low_rank.items() if w.rank != rank},
            modules_to_save=tuple(
                path.replace("/", ".")
                for path, adapter in self.adapters.items()
                if not isinstance(adapter, LoraWeights)
            ),
        )
        alphas = {}
        for name, weights in low_rank.items():
            if isinstance(weights.scaling, float) and weights.scaling != config.scaling_of(name):
                root = math.sqrt(weights.rank) if config.rslora else weights.rank
                alphas[name] = weights.scaling * root
        return dataclasses.replace(config, alpha_pattern=alphas)
