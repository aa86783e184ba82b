"""An arrow goes down only: which part of the library may import which.

Read from the source, so that an import inside a function counts too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = [
    {"errors"},
    {"pallas_kernels"},
    {"quant"},
    {"lora", "lift", "lifting"},
    {"models", "checkpoints"},
    {"parallel"},
    {"training", "data", "generation"},
    {"cli", "commands", "demo_task", "plan"},
]
"""Lowest first. The parts of one floor may import each other; `qlora_jax/__init__.py` is a roof."""

HEIGHT = {part: height for height, floor in enumerate(FLOORS) for part in floor}
# Models are what the library is used on: they stand beside lora and lift, not on top of them.
FORBIDDEN = {("models", part) for part in ("quant", "lora", "lift", "lifting", "checkpoints")}

SOURCES = sorted([*(ROOT / "qlora_jax").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")])


def part_of(module: str) -> str | None:
    """ "qlora_jax.quant.array" -> "quant"; None for what is not ours and for the roof itself."""
    names = module.split(".")
    if names[0] == "pallas_kernels":
        return "pallas_kernels"
    return names[1] if names[0] == "qlora_jax" and len(names) > 1 else None


def module_of(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; relative imports resolved."""
    found = set()
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from qlora_jax import lora` imports qlora_jax.lora.
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def ups(path: Path) -> list[str]:
    """What a file imports from higher floors, or from a part it must not know."""
    here = part_of(module_of(path))
    if here is None:
        return []
    parts = {part for module in imported(path) if (part := part_of(module)) in HEIGHT}
    return sorted(p for p in parts if HEIGHT[p] > HEIGHT[here] or (here, p) in FORBIDDEN)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    here = part_of(module_of(path))
    assert here is None or here in HEIGHT, f"{here}: say in FLOORS where this part stands"
    assert not ups(path), f"{path.relative_to(ROOT)} imports from above: {ups(path)}"


def test_nothing_imports_the_roof():
    """`import qlora_jax` from inside would import every floor at once, and in a circle."""
    for path in SOURCES:
        if part_of(module_of(path)) in (None, "cli", "commands"):
            continue
        tree = ast.parse(path.read_text())
        plain = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        assert "qlora_jax" not in plain, path


def test_the_test_sees_an_import_that_goes_up(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_floors.ROOT", tmp_path)
    path = tmp_path / "qlora_jax" / "quant" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text("def f():\n    from qlora_jax import training\n    from ..lift import lift\n")
    assert ups(path) == ["lift", "training"]
    model = tmp_path / "qlora_jax" / "models" / "bad.py"
    model.parent.mkdir()
    model.write_text("import qlora_jax.lift\n")
    assert ups(model) == ["lift"]
