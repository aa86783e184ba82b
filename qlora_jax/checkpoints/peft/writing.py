"""Writing adapters as PEFT does: the tensors, and what adapter_config.json says of them."""

import collections
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.checkpoints.folder import new_file
from qlora_jax.checkpoints.names import Parameter, parameters
from qlora_jax.checkpoints.peft.description import (
    CONFIG,
    MAGNITUDE,
    PREFIX,
    PROJECTION_A,
    PROJECTION_B,
    WEIGHTS,
    factor_names,
)
from qlora_jax.checkpoints.peft.experts import fused_settings, unread_by_peft
from qlora_jax.checkpoints.peft.target_names import target_names, whole_modules
from qlora_jax.checkpoints.peft.tied import EMBEDDING, check_tied, is_tied, tied_head
from qlora_jax.checkpoints.tensors import fault_of
from qlora_jax.errors import QloraError, missing
from qlora_jax.lora import Adapters, LoraConfig, LoraWeights, VeraConfig, VeraWeights
from qlora_jax.lora.tree import named_leaves
from qlora_jax.lora.vera import PROJECTIONS, VeraProjections, draw_projections
from qlora_jax.quant import path_str

logger = logging.getLogger("qlora_jax.peft")


def save(
    folder: str | Path,
    adapters: Adapters,
    model: AnyModel,
    config: LoraConfig | VeraConfig | None = None,
) -> None:
    """Writes `adapters` of `model` as PEFT does; PEFT loads them onto the same base model.

    Rank and alpha come from the adapters; `config`, the one they were made by, adds dropout,
    rsLoRA and VeRA's settings. An adapter already in `folder` is replaced. Raises QloraError,
    before anything is written, for a path that the model lacks, for numbers that are not finite,
    for a tied embedding under DoRA, and if VeRA's matrices are to be left out but are not those
    that PEFT would draw. Adapters that are written but that PEFT passes over are logged as
    a warning.
    """
    try:
        from safetensors.numpy import save_file
    except ModuleNotFoundError as error:
        raise missing("safetensors", f"writing {folder}", "hf") from error
    shared = adapters.get(PROJECTIONS)
    try:
        table, adapters, description = _described(adapters, model, config)
    except QloraError as error:
        raise QloraError(f"{folder}: nothing was written, {error}") from error
    flat, _ = jax.tree_util.tree_flatten_with_path(adapters)
    if faults := [f"{path_str(at)}: {fault}" for at, x in flat if (fault := fault_of(x))]:
        raise QloraError(
            f"{folder}: nothing was written, the adapters are not whole:\n  " + "\n  ".join(faults)
        )
    tensors = {PREFIX + name: x for name, x in _tensors(adapters, table, model)}
    tensors |= tied_head(tensors, model)
    if shared is not None:
        vera = config if isinstance(config, VeraConfig) else VeraConfig()
        tensors |= _projections(folder, shared, vera)
    if unread := unread_by_peft(adapters):
        logger.warning(
            "%s: PEFT beside transformers 5 passes over the adapters of %s, since it takes their "
            "names for those of experts; they are read here, and merged weights have them",
            folder,
            ", ".join(unread),
        )
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with new_file(folder / CONFIG) as part:
        part.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def check(
    adapters: Adapters, model: AnyModel, config: LoraConfig | VeraConfig | None = None
) -> None:
    """Raises QloraError for adapters (arrays, or their shapes) that `save` has no form for."""
    _described(adapters, model, config)


def _described(
    adapters: Adapters, model: AnyModel, config: LoraConfig | VeraConfig | None
) -> tuple[dict[str, Parameter], Adapters, dict[str, Any]]:
    """The model's parameters by path, the adapters of parameters, and what adapter_config.json
    says of them."""
    table = {parameter.path: parameter for parameter in parameters(model.config)}
    own = {path: adapter for path, adapter in adapters.items() if path != PROJECTIONS}
    if strangers := [path for path in own if path not in table]:
        raise QloraError(f"the model has no parameters {strangers}")
    check_tied(own, model)
    if PROJECTIONS in adapters:
        vera = config if isinstance(config, VeraConfig) else VeraConfig()
        return table, own, _describe_vera(own, table, model, vera)
    plain = config if isinstance(config, LoraConfig) else LoraConfig()
    return table, own, _describe(own, table, model, plain)


def _tensors(
    adapters: Adapters, table: Mapping[str, Parameter], model: AnyModel
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
            module = parameter.module(layer)
            if isinstance(adapter, VeraWeights):
                yield f"{module}.vera_lambda_d", _contiguous(adapter.lambda_d[at])
                yield f"{module}.vera_lambda_b", _contiguous(adapter.lambda_b[at])
            elif isinstance(adapter, LoraWeights):
                names = factor_names(parameter)
                yield f"{module}.{names[0]}", _contiguous(adapter.a[at].T)
                yield f"{module}.{names[1]}", _contiguous(adapter.b[at].T)
                if adapter.magnitude is not None:
                    yield f"{module}.{MAGNITUDE}", _contiguous(adapter.magnitude[at])
            else:
                yield parameter.hf_name(layer), _contiguous(parameter.to_file(adapter[at]))


def _projections(
    folder: str | Path, shared: VeraProjections, config: VeraConfig
) -> dict[str, np.ndarray]:
    """VeRA's matrices, if they are to be stored."""
    if config.save_projection:
        return {PROJECTION_A: _contiguous(shared.a.T), PROJECTION_B: _contiguous(shared.b.T)}
    (k, rank), n = shared.a.shape, shared.b.shape[1]
    drawn = draw_projections(config.projection_prng_key, k, n, rank)
    if not (np.array_equal(drawn.a, shared.a) and np.array_equal(drawn.b, shared.b)):
        raise QloraError(
            f"{folder}: save_projection is off, but VeRA's matrices are not those that "
            f"projection_prng_key {config.projection_prng_key} gives; they must be stored"
        )
    return {}


def _layers(parameter: Parameter, adapter: Any) -> list[int]:
    """The layers that are written. `load` gives those without an adapter a scaling of zero."""
    layers = range(parameter.layers)
    if isinstance(adapter, LoraWeights) and isinstance(adapter.scaling, tuple):
        return [layer for layer in layers if adapter.scaling[layer]]
    return list(layers)


def _is_full(adapter: Any) -> bool:
    return adapter is not None and not isinstance(adapter, LoraWeights | VeraWeights)


def _contiguous(x: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x, np.float32))


def _common(
    adapters: Adapters, table: Mapping[str, Parameter], model: AnyModel, kind: str
) -> dict[str, Any]:
    """What adapter_config.json says of any adapter."""
    full = {table[p].hf_module for p, adapter in adapters.items() if _is_full(adapter)}
    whole = whole_modules(full, table.values())
    adapted = (
        table[path].module(layer)
        for path, adapter in adapters.items()
        if not _is_full(adapter)
        for layer in _layers(table[path], adapter)
    )
    return {
        "peft_type": kind,
        "task_type": model.task_type,
        "base_model_name_or_path": model.source,
        "inference_mode": True,
        "target_modules": sorted(target_names(adapted, whole, table.values())),
        "modules_to_save": sorted(whole) or None,
        "bias": "none",
        # Of transformers' Conv1D, whose weights are [in, out], and of nothing else.
        "fan_in_fan_out": any(
            table[path].kernel and not table[path].transposed for path in adapters
        ),
    }


def _describe(
    adapters: Adapters, table: Mapping[str, Parameter], model: AnyModel, config: LoraConfig
) -> dict[str, Any]:
    """Of LoRA: the commonest rank and alpha, and patterns for the others."""
    settings: dict[str, tuple[int, float]] = {}
    low_rank = {p: w for p, w in adapters.items() if isinstance(w, LoraWeights)}
    stacks = collections.Counter((p.hf_module, p.suffix) for p in table.values())
    for path, adapter in low_rank.items():
        divisor = math.sqrt(adapter.rank) if config.rslora else adapter.rank
        parameter, scaling = table[path], adapter.scaling
        # What may differ among layers is said layer by layer.
        if isinstance(scaling, tuple) or stacks[parameter.hf_module, parameter.suffix] > 1:
            for layer in _layers(parameter, adapter):
                one = scaling[layer] if isinstance(scaling, tuple) else scaling
                settings[parameter.module(layer)] = (adapter.rank, _number(one * divisor))
        else:
            name = parameter.hf_module.split("{}.", 1)[-1].replace("{}", r"\d+")
            settings[name] = (adapter.rank, _number(scaling * divisor))
    usual = collections.Counter(settings.values()).most_common(1)
    rank, alpha = usual[0][0] if usual else (config.rank, config.alpha)
    lengths = {w.magnitude is not None for w in low_rank.values()}
    if len(lengths) > 1:
        raise QloraError("some adapters have DoRA's magnitudes and some have none; PEFT cannot")
    # These are always said, since PEFT would not take the usual ones for them.
    fused = fused_settings(adapters, rslora=config.rslora)
    settings |= {name: (r, _number(a)) for name, (r, a) in fused.items()}
    embedded = EMBEDDING in adapters and is_tied(model)
    return _common(adapters, table, model, "LORA") | {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": lengths == {True},
        # Whatever A and B started from, they belong to the base as it is now.
        "init_lora_weights": True,
        "rank_pattern": {
            name: r for name, (r, _) in settings.items() if r != rank or name in fused
        },
        "alpha_pattern": {
            name: a for name, (_, a) in settings.items() if a != alpha or name in fused
        },
        # The head of a tied model is the embedding, so what is added to one is added to both.
        "ensure_weight_tying": embedded,
    }


def _describe_vera(
    adapters: Adapters, table: Mapping[str, Parameter], model: AnyModel, config: VeraConfig
) -> dict[str, Any]:
    ranks = {w.rank for w in adapters.values() if isinstance(w, VeraWeights)}
    return _common(adapters, table, model, "VERA") | {
        "r": ranks.pop(),
        "vera_dropout": config.dropout,
        "d_initial": config.d_initial,
        "projection_prng_key": config.projection_prng_key,
        "save_projection": config.save_projection,
    }


def _number(x: float) -> float:
    """32, where arithmetic on scaling left 32.000000000000004."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-9, abs_tol=1e-12) else x
