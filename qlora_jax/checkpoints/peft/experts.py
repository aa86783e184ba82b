"""Adapters of experts as PEFT writes them beside transformers 5, which stacks and fuses experts.

There a layer's experts are two parameters, gate_up_proj [E, 2F, D] and down_proj [E, D, F], and an
adapter of each is two matrices for all experts, lora_A [E R, in] and lora_B [out, R E]. Here, and
in files of weights, every expert has three modules of its own. Adapters are written in that form,
which PEFT reads too; this is for reading the other.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qlora_jax.checkpoints.names import Parameter
from qlora_jax.errors import QloraError
from qlora_jax.lora import Adapters, LoraWeights

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""A parameter of transformers -> what of ours it consists of, in the order of its rows."""
_KEY = re.compile(
    r"(?P<prefix>.*)model\.layers\.(?P<layer>\d+)\.mlp\."
    r"(?P<module>experts\.base_layer|experts|gate)\.lora_(?P<factor>[AB])\.weight"
)


def fused_settings(adapters: Adapters, *, rslora: bool) -> dict[str, tuple[int, float]]:
    """Rank and alpha of what PEFT fuses the adapters of experts into, by a pattern of its name.

    Left alone PEFT doubles the usual rank and alpha for gate and up, which is another scaling where
    experts have a rank of their own, and with rsLoRA. Raises QloraError if gate and up differ in
    their scaling: fused they have one.
    """
    found = {}
    for name, parts in _PARTS.items():
        weights = [adapters.get(f"layers/mlp/experts/{part}/kernel") for part in parts]
        factors = [w for w in weights if isinstance(w, LoraWeights)]
        if len(factors) < len(parts):
            continue
        scalings = {w.scaling for w in factors}
        if len(scalings) > 1:
            raise QloraError(
                f"{' and '.join(parts)} of experts have the scalings {scalings}; PEFT fuses them, "
                "so that they need the same"
            )
        (scaling,), rank = scalings, sum(w.rank for w in factors)
        if isinstance(scaling, float | int):
            # Before PEFT's own pattern ".*\.gate_up_proj", also where it has sorted them. Layers
            # without experts have a down_proj too.
            found[rf"(experts\.{name})"] = rank, scaling * (math.sqrt(rank) if rslora else rank)
    return found


def unread_by_peft(adapters: Adapters) -> list[str]:
    """Those that PEFT passes over: beside transformers 5 it takes every adapter of a module with
    the last name of an expert's part for one of experts."""
    return [path for path in adapters if re.match(r"dense_layers/mlp/", path)]


def split_experts(
    tensors: Mapping[str, np.ndarray], about: Mapping[str, Any], table: Mapping[str, Parameter]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and adapter_config.json with target_parameters, as if experts had been modules.

    Gate and up get the same A, and each its rows of B. table: path -> parameter of the model.
    Raises QloraError for what target_parameters names other than experts and routers, for shapes
    that do not fit, and for ranks or alphas that differ among the layers.
    """
    names, router = about["target_parameters"], table.get("layers/mlp/router/kernel")
    known = {**{f"mlp.experts.{name}": name for name in _PARTS}, "mlp.gate.weight": "gate"}
    meant = {name: [known[k] for k in known if f".{k}".endswith(f".{name}")] for name in names}
    strange = [name for name in names if len(meant[name]) != 1]
    if router is None or strange:
        raise QloraError(f"not supported: target_parameters {strange or names}")
    ours = {part: table[f"layers/mlp/experts/{part}/kernel"] for part in sum(_PARTS.values(), ())}
    experts = ours["down_proj"].stack[1]
    chosen = {name for (name,) in meant.values()}
    fused = [name for name in _PARTS if name in chosen]
    modules = {"gate": "gate"}
    if fused:
        # The first of two parameters is wrapped first, and so lies inside of the other's wrapper.
        modules |= {"experts.base_layer": fused[0], "experts": fused[-1]}
    parts: dict[str, np.ndarray] = {}
    settings: dict[str, tuple[int, float]] = {}
    for key, x in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["module"] not in modules:
            parts[key] = x
            continue
        prefix, layer, factor = match["prefix"], int(match["layer"]), match["factor"]
        name = modules[match["module"]]
        if name == "gate":
            parts[f"{prefix}{router.hf_module.format(layer)}.lora_{factor}.weight"] = x
            continue
        for part, expert, one in _pieces(key, x, name, factor, experts):
            module = ours[part].hf_module.format(layer, expert)
            parts[f"{prefix}{module}.lora_{factor}.weight"] = one
        module = f"model.layers.{layer}.mlp.experts.{name}"
        found = setting(about, "r", module), setting(about, "lora_alpha", module)
        if settings.setdefault(name, found) != found:
            raise QloraError(f"not supported: ranks or alphas of {name} that differ among layers")
    last = {part: p.hf_module.rpartition(".")[2] for part, p in ours.items()}
    ends = [last[part] for name in settings for part in _PARTS[name]]
    within = any(p.numbers for p in ours.values())
    # Where some layers have one MLP in place of experts, its parts have the same last names.
    named = [f"experts.{i}.{end}" for end in ends for i in range(experts)] if within else ends
    before = r"experts\.\d+\." if within else ""
    own = {before + last[part]: found for name, found in settings.items() for part in _PARTS[name]}
    targets = [*named, *([router.hf_module.rpartition(".")[2]] if "gate" in chosen else [])]
    return parts, {
        **about,
        "target_parameters": None,
        "target_modules": _and_also(about.get("target_modules"), targets),
        "rank_pattern": _before({n: r for n, (r, _) in own.items()}, about.get("rank_pattern")),
        "alpha_pattern": _before({n: a for n, (_, a) in own.items()}, about.get("alpha_pattern")),
    }


def _before(own: dict[str, Any], patterns: Mapping[str, Any] | None) -> dict[str, Any]:
    """Patterns of which `own` count first. PEFT leaves those in that experts had as modules."""
    return own | {key: value for key, value in (patterns or {}).items() if key not in own}


def _pieces(
    key: str, x: np.ndarray, name: str, factor: str, experts: int
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(our part, expert, its lora_A [R, in] or lora_B [out, R])."""
    parts = _PARTS[name]
    rows, columns = (experts, 1) if factor == "A" else (len(parts), experts)
    if x.ndim != 2 or x.shape[0] % rows or x.shape[1] % columns:
        raise QloraError(f"{key}: {x.shape} is not fit for {experts} experts")
    if factor == "A":
        for expert, one in enumerate(np.split(x, experts)):
            yield from ((part, expert, one) for part in parts)
        return
    # Experts vary slowest along the rows of A, and fastest along the columns of B.
    for part, half in zip(parts, np.split(x, len(parts)), strict=True):
        for expert in range(experts):
            yield part, expert, np.ascontiguousarray(half[:, expert::experts])


def setting(about: Mapping[str, Any], key: str, module: str) -> Any:
    """r or lora_alpha of a module, by PEFT's rule: the first pattern that matches the end of its
    name, else the default."""
    patterns = about.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]) or {}
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return about[key]


def _and_also(modules: Any, targets: list[str]) -> Any:
    """target_modules that name `targets` too."""
    if isinstance(modules, str):
        return rf"(?:{modules})|(?:.*\.(?:{'|'.join(targets)}))"
    return [*(modules or []), *targets]
