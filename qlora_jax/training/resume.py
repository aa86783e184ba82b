"""Whether a run is the one that a checkpoint is of."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from qlora_jax import lora
from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.data import TokenizedDataset
from qlora_jax.errors import QloraError
from qlora_jax.training.fingerprint import base_fingerprint, data_fingerprint
from qlora_jax.training.settings import TrainSettings

FREE = {
    *("eval_every", "save_every", "keep", "log_every", "max_skipped"),
    *("remat", "paged", "memory"),
}
"""Settings of a run that may change while it stands still: the loss curve stays the same; with
those of the second line, which say how it is computed, up to rounding."""


def describe_run(
    model: AnyModel,
    config: lora.LoraConfig | lora.VeraConfig,
    train: TokenizedDataset,
    settings: TrainSettings,
    steps: int,
    *,
    own_optimizer: bool,
) -> dict[str, Any]:
    """All that decides what a run computes, as JSON has it; of the large parts, fingerprints."""
    training = {n: x for n, x in dataclasses.asdict(settings).items() if n not in FREE}
    about = {
        "base": {"source": model.source, "fingerprint": base_fingerprint(model)},
        "data": {
            "examples": len(train),
            "fingerprint": data_fingerprint(train),
            "today": train.today,  # for whoever tokenizes the rows again
        },
        "settings": {
            **{f"training.{name}": value for name, value in training.items()},
            # Of epochs and the data.
            "training.steps": steps,
            "optimizer": "one of your own" if own_optimizer else "that of the settings",
            "adapters": type(config).__name__,
            **{f"lora.{name}": value for name, value in dataclasses.asdict(config).items()},
            "dtype": str(model.dtype),
        },
    }
    return json.loads(json.dumps(about))


def check_same(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises QloraError, naming both sides, if the run `now` is not the run `before`."""
    old, new = before["base"], now["base"]
    if old["fingerprint"] != new["fingerprint"]:
        raise QloraError(
            f"{output}: its run has the base {old['source']} (fingerprint {old['fingerprint']}), "
            f"this is {new['source']} (fingerprint {new['fingerprint']}); --resume needs the same "
            "weights in the same quantization and dtype"
        )
    old, new = before["data"], now["data"]
    if any(old[name] != new[name] for name in ("examples", "fingerprint")):
        raise QloraError(
            f"{output}: its run trains on {old['examples']} examples (fingerprint "
            f"{old['fingerprint']}), these are {new['examples']} (fingerprint "
            f"{new['fingerprint']}); --resume needs the same rows, tokenized alike"
        )
    old, new = before["settings"], now["settings"]
    changed = [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise QloraError(
            f"{output}: --resume goes on with the settings that its run began with; these would "
            "change what it computes:\n  " + "\n  ".join(changed)
        )
