"""Examples in docs/ are run as printed, but for the model: a tiny random one stands in."""

from pathlib import Path

import jax
import pytest

from tests import tiny
from tests.test_readme import MODEL, blocks

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.standard_promotion
def test_decomposed_adapters(tmp_path):
    (example,) = blocks("python", DOCS / "adapters.md")
    assert MODEL in example
    folder = tiny.write_checkpoint(tmp_path / "model", layers=1)
    scope: dict = {}
    exec(compile(example.replace(MODEL, repr(str(folder))), "adapters.md", "exec"), scope)
    qj, model, adapters = (scope[name] for name in ("qj", "model", "adapters"))
    merged = qj.lora.merge(model.params, adapters)
    for path, leaf in qj.lora.adapters.named_leaves(scope["dense"].params).items():
        if path in adapters:
            found = qj.lora.adapters.named_leaves(merged)[path]
            assert jax.numpy.linalg.norm(found - leaf) < 0.1 * jax.numpy.linalg.norm(leaf)
