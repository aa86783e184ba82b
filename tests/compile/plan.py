"""Compile the steps of LLaMA 7B and 65B as `qlora-jax plan` does, and check its formula by them.

    python -m tests.compile.plan "RTX A6000"

`tests.compile.run` sets the environment that the compiler needs.
"""

import sys

from qlora_jax.lora import LoraConfig
from qlora_jax.plan.report import gib
from qlora_jax.plan.worker import compile_step
from qlora_jax.plan.workload import Workload
from qlora_jax.training.footprint import Footprint
from qlora_jax.training.settings import TrainSettings
from tests.compile.targets import TARGETS

SHAPES = {"7B": (4096, 11008, 32, 32), "65B": (8192, 22016, 80, 64)}
TOLERANCE = 0.1


def workload(size: str, time: int) -> Workload:
    """Rank 64 on all linear layers of a LLaMA, batch 1, as in the QLoRA paper."""
    hidden, wide, layers, heads = SHAPES[size]
    about = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }
    return Workload(about, time, LoraConfig(rank=64), TrainSettings(batch_size=1, remat="full"))


def main(name: str) -> None:
    device, wrong = TARGETS[name], []
    for size in SHAPES:
        question = workload(size, 512)
        answer = compile_step(question, device)
        estimated = Footprint(**answer["estimate"])
        compiled = answer["arguments"] + answer["outputs"] + answer["temporaries"]
        off = estimated.total / compiled - 1
        codes = f"{answer['implementation']}, attention by {answer['attention']}"
        print(
            f"{name}, {size} at 512 tokens, {codes}: compiled in "
            f"{answer['seconds']:.0f} s, {gib(compiled)}; by formula {off:+.1%}",
            flush=True,
        )
        if abs(off) > TOLERANCE:
            wrong.append(size)
    if wrong:
        raise SystemExit(f"the formula is off by more than {TOLERANCE:.0%}: {', '.join(wrong)}")


if __name__ == "__main__":
    main(sys.argv[1])
