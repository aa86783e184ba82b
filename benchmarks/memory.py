"""Memory of a QLoRA step of LLaMA 7B to 65B on one 48 GB GPU, by its compiler and without it.

    python -m benchmarks.memory COMPILERS [--models 7B 65B] [--times 512 2048] [--remat full]

The step is the one that `qlora-jax train` runs: NF4 with double quantization, rank 64 on all linear
layers, one sequence, AdamW, bf16. COMPILERS: the folder that `make compile` makes. Each step is
compiled for an RTX A6000 in a process of its own.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any, get_args

import qlora_jax as qj
from qlora_jax.models.remat import RematPolicy
from qlora_jax.plan.compiling import Compiler
from qlora_jax.plan.devices import find
from qlora_jax.plan.workload import Workload
from qlora_jax.training.settings import TrainSettings

GIB = 2**30
DEVICE = "a6000"
MODELS = {
    "7B": (32, 4096, 11008, 32),
    "13B": (40, 5120, 13824, 40),
    "33B": (60, 6656, 17920, 52),
    "65B": (80, 8192, 22016, 64),
}
"""Layers, D, F, heads (arXiv:2302.13971, table 2)."""
PAPER = {"7B": 5, "13B": 10, "33B": 21, "65B": 41}
"""Sizes of Guanaco in the QLoRA paper, GB (arXiv:2305.14314, table 6): the model alone."""
COLUMNS = (
    *("codes", "scales", "embeddings", "adapters", "gradients", "optimizer", "activations"),
    *("working", "total", "host"),
)
"""Of `qlora_jax.training.footprint.Footprint`."""


def workload(
    model: str, time: int, *, paged: bool = False, remat: RematPolicy = "full"
) -> Workload:
    """The training step of that LLaMA."""
    layers, width, inner, heads = MODELS[model]
    about: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    training = TrainSettings(batch_size=1, remat=remat, paged=paged)
    return Workload(about, time, qj.LoraConfig(rank=64), training)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("compilers", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--times", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--remat", choices=get_args(RematPolicy), default="full")
    options = parser.parse_args()

    print(f"| model (paper) | T | paged | {' | '.join(COLUMNS)} | products | compiled, s |")
    print("|---" * (len(COLUMNS) + 5) + "|")
    for model, time, paged in itertools.product(options.models, options.times, (False, True)):
        with Compiler(find(DEVICE), options.compilers) as compiler:
            compiled = compiler(workload(model, time, paged=paged, remat=options.remat))
        sizes = [getattr(compiled.footprint, name) / GIB for name in COLUMNS]
        print(
            f"| {model} ({PAPER[model]} GB) | {time} | {'yes' if paged else 'no'} | "
            f"{' | '.join(f'{size:.2f}' for size in sizes)} | {compiled.implementation} | "
            f"{compiled.seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
