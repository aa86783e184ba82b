"""`import qlora_jax` loads jax, flax, optax, numpy, and what those load; nothing else.

How long it takes beyond them is measured by benchmarks/import_time.py.
"""

import json
import subprocess
import sys

import pytest

ALLOWED = "import jax, flax.nnx, optax, numpy"
PROBE = "import json, sys; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
OPTIONAL = (
    "torch", "transformers", "tokenizers", "datasets", "gguf", "grain", "matplotlib", "tyro",
    "rich",
)  # fmt: skip


def modules_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\n{PROBE}"], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_loads_nothing_optional():
    base = modules_after(ALLOWED)
    ours = modules_after(f"{ALLOWED}\nimport qlora_jax")
    extra = ours - base - {"qlora_jax", "pallas_kernels"} - set(sys.stdlib_module_names)
    assert not extra, f"import qlora_jax also loads {sorted(extra)}"
    assert not {name for name in OPTIONAL if name in ours and name not in base}


@pytest.mark.parametrize("name", ["load", "lift", "NF4", "TrainState", "make_train_step"])
def test_public_names(name):
    import qlora_jax

    assert callable(getattr(qlora_jax, name))
