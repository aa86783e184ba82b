"""What `train` leaves of a classifier beside its adapter, for the commands that read it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.encoder import EncoderModel
from qlora_jax.checkpoints.folder import new_file
from qlora_jax.checkpoints.json_files import read_json
from qlora_jax.errors import QloraError
from qlora_jax.models.encoder_config import CLASSIFICATION, EncoderConfig

LABELS = "labels.json"
"""The names of the classes, in order, and the problem_type: PEFT's files have no place for them."""
_LAST = re.compile(r"classifier(\.out_proj)?\.weight$")


def write_labels(folder: Path, config: EncoderConfig) -> None:
    """Those of a classifier, beside the adapter in `folder`."""
    about = {"labels": config.labels, "problem_type": config.problem_type}
    with new_file(folder / LABELS) as part:
        part.write_text(json.dumps(about) + "\n", encoding="utf-8")


def head_of(adapter: Path) -> dict[str, Any]:
    """What `load` is told of the classifier in an adapter's folder; empty if there is none."""
    if read_json(adapter / peft.CONFIG).get("task_type") != "SEQ_CLS":
        return {}
    shapes = peft.tensor_shapes(adapter)
    counts = [shape[0] for name, shape in shapes.items() if _LAST.search(name) and shape]
    return {"head": CLASSIFICATION, **({"num_labels": counts[0]} if counts else {})}


def with_labels(model: Any, adapter: Path) -> Any:
    """The model with the classes that stand beside the adapter, if they do."""
    if not isinstance(model, EncoderModel) or not (adapter / LABELS).is_file():
        return model
    about = read_json(adapter / LABELS)
    labels, problem = about.get("labels"), about.get("problem_type")
    if not isinstance(labels, list) or len(labels) != len(model.config.labels):
        raise QloraError(
            f"{adapter / LABELS}: expected the names of {len(model.config.labels)} labels"
        )
    labels = tuple(map(str, labels))
    config = dataclasses.replace(model.config, labels=labels, problem_type=problem)
    return dataclasses.replace(model, config=config)
