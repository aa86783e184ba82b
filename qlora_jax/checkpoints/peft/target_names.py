"""Which names of modules an adapter_config.json lists, so that PEFT means the ones we mean."""

import re
from collections.abc import Iterable, Iterator

from qlora_jax.checkpoints.names import Parameter


def target_names(
    adapted: Iterable[str], full: Iterable[str], table: Iterable[Parameter]
) -> set[str]:
    """target_modules: for each adapted module the shortest end of its name that means no other.

    adapted  whole names of the modules with an adapter, "model.layers.0.self_attn.q_proj"
    full     what modules_to_save lists; PEFT looks for no targets in there
    table    every parameter of the model
    """
    adapted = set(adapted)
    others = {
        parameter.module(layer)
        for parameter in table
        if parameter.path.endswith(("/kernel", "/embedding"))
        for layer in range(parameter.layers)
    }
    others -= adapted
    others -= {module for module in others if any(is_inside(module, name) for name in full)}
    return {next(_ends(module, others)) for module in adapted}


def _ends(module: str, others: set[str]) -> Iterator[str]:
    """Ends of the name that no other module has, the shortest first, none with a layer's number."""
    parts = re.split(r"\.\d+\.", module)[-1].split(".")
    for start in reversed(range(len(parts))):
        end = ".".join(parts[start:])
        if not any(other == end or other.endswith(f".{end}") for other in others):
            yield end
    yield module


def whole_modules(full: Iterable[str], table: Iterable[Parameter]) -> set[str]:
    """modules_to_save: the largest modules all of whose parameters are trained in full.

    full: names of modules with {} for the layer. A module inside of a layer stands for that of all.
    """
    full = set(full)
    frozen = {parameter.hf_module for parameter in table} - full
    names = set()
    for module in full:
        parts = module.rpartition("{}.")[2].split(".")
        layer = module.removesuffix(".".join(parts))
        larger = (".".join(parts[: i + 1]) for i in range(len(parts)))
        names.add(
            next(m for m in larger if not any(is_inside(other, layer + m) for other in frozen))
        )
    return names


def is_inside(module: str, name: str) -> bool:
    """Whether the module is the one of this name, or lies in it."""
    return module == name or module.startswith(f"{name}.")
