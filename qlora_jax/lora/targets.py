"""From names to parameters: which leaves of a tree a configuration means."""

from collections.abc import Iterable

from qlora_jax.errors import QloraError
from qlora_jax.lora.config import LoraConfig, matches
from qlora_jax.lora.vera import VeraConfig
from qlora_jax.quant.policy import Policy

_WEIGHTS = ("kernel", "embedding")
_NO_MATRICES = ("bias", "scale")


def module_name(path: str) -> str:
    """The dotted name of the module that owns a weight: "mlp/up/kernel" -> "mlp.up".

    A parameter that is neither kernel nor embedding is its own module.
    """
    parent, _, last = path.rpartition("/")
    return (parent if last in _WEIGHTS else path).replace("/", ".")


def select_targets(
    shapes: dict[str, tuple[int, ...]], config: LoraConfig | VeraConfig
) -> list[str]:
    """The paths, among those of `shapes`, that get an adapter.

    Raises QloraError for a target that matches nothing.
    """
    candidates = {
        path: module_name(path)
        for path, shape in shapes.items()
        if len(shape) >= 2 and path.rpartition("/")[2] not in _NO_MATRICES
    }
    known = set(candidates.values())
    if config.targets == "all-linear":
        linear = Policy()
        chosen = [path for path in candidates if linear.selects(path, shapes[path])]
        if not chosen:
            raise _unmatched("all-linear", known)
        return chosen
    if isinstance(config.targets, str):
        chosen = [path for path, name in candidates.items() if matches(config.targets, name)]
        if not chosen:
            raise _unmatched(config.targets, known)
        return chosen
    if not config.targets and not config.modules_to_save:
        raise QloraError("nothing to train: targets and modules_to_save are both empty")
    for target in config.targets:
        if not any(_is_suffix(target, name) for name in known):
            raise _unmatched(target, known)
    return [p for p, name in candidates.items() if any(_is_suffix(t, name) for t in config.targets)]


def check_patterns(config: LoraConfig, modules: Iterable[str]) -> None:
    """Raises QloraError for patterns of ranks and alphas that match none of the adapted modules."""
    modules = sorted(set(modules))
    lost = [
        f"{setting}: {pattern}"
        for setting, patterns in (
            ("rank_pattern", config.rank_pattern),
            ("alpha_pattern", config.alpha_pattern),
        )
        for pattern in patterns
        if not any(matches(pattern, module) for module in modules)
    ]
    if lost:
        raise QloraError(
            "patterns that match no adapted module (layers are stacked here, so their names have "
            "no number):\n  " + "\n  ".join(lost) + f"\nadapted are: {', '.join(modules) or 'none'}"
        )


def select_full(paths: Iterable[str], modules: tuple[str, ...]) -> list[str]:
    """The paths of every parameter below the named modules."""
    paths = list(paths)
    chosen: list[str] = []
    for module in modules:
        below = [p for p in paths if any(_is_suffix(module, prefix) for prefix in _prefixes(p))]
        if not below:
            known = {prefix for p in paths for prefix in _prefixes(p)}
            raise _unmatched(module, known, "module to train in full")
        chosen += below
    return list(dict.fromkeys(chosen))


def _is_suffix(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _prefixes(path: str) -> list[str]:
    """The modules around a parameter, and itself: "a/b/scale" -> a, a.b, a.b.scale."""
    parts = path.split("/")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _unmatched(name: str, known: set[str], kind: str = "target") -> QloraError:
    tied = "embed_tokens" in known and _is_suffix("lm_head", name)
    hint = " (a tied head is the table of embed_tokens)" if tied else ""
    there = ", ".join(sorted(known)) or "none"
    return QloraError(f"{kind} {name!r} matches no module{hint}; there are: {there}")
