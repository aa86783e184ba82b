"""Fixtures of the comparisons with PyTorch's libraries."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars():
    """transformers draws one for every checkpoint it loads."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """A stored reference run on SmolLM2-135M, which is not part of the repository."""
    root = Path(__file__).resolve().parents[2]
    default = root.parent / "shared" / "goldens" / "smollm2_gsm8k_r16"
    folder = Path(os.environ.get("QLORA_JAX_REFERENCE_RUN", default))
    if not folder.is_dir():
        pytest.skip(f"no reference run in {folder}; set QLORA_JAX_REFERENCE_RUN to a folder of one")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the other libraries deprecate among themselves is theirs to mend. Files with slow tests
    come first: begun last, one of them would leave the other worker without work for ten minutes.
    """
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default::FutureWarning"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
