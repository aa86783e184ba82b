"""How far fp32 logits of SmolLM2-135M are from transformers' and from float64, text by text.

    python -m benchmarks.fp32_logits [TEXTS.jsonl [FIELD]]

Of every text (those below, or a field of a file's lines, "question" by default) the largest
difference of a logit, in 1e-4: ours, with products at once and in pieces (`models.products`), and
those of transformers' two attentions; and what the pieces cost hidden states in time and memory.
Needs torch and transformers.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

import qlora_jax as qj
from benchmarks import smollm2
from qlora_jax.models import products

TEXTS = (
    "The capital of France is Paris, and 2 + 2 = 4.\nfor i in range(10): print(i)",
    "Natalia sold clips to 48 of her friends in April, and half as many clips in May.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n",
    "Once upon a time, in a village by the sea, there lived an old fisherman who had never learned "
    "to swim, although his father had drowned in the bay where he cast his nets every morning.",
    "Hello!",
    "Paris",
    "Water boils at 100 degrees Celsius at sea level; on a mountain it boils at less.",
)
SHAPES = ((1, 1), (1, 8), (1, 64), (4, 256), (1, 1024))
AT_ONCE, IN_PIECES = "at once", "in pieces"


@contextmanager
def dense_products(how: str) -> Iterator[None]:
    """What is traced meanwhile multiplies so."""
    before = products.TERMS
    products.TERMS = before if how == IN_PIECES else sys.maxsize
    jax.clear_caches()
    try:
        yield
    finally:
        products.TERMS = before


def texts_of(arguments: list[str]) -> list[str]:
    if not arguments:
        return list(TEXTS)
    field = arguments[1] if arguments[1:] else "question"
    return [json.loads(line)[field] for line in Path(arguments[0]).open(encoding="utf-8")]


def peer(file: Path, attention: str, dtype: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, attn_implementation=attention
    ).eval()


def differences(model: qj.Model, file: Path, texts: list[str]) -> None:
    ids = [np.asarray([model.tokenizer(text)["input_ids"]], np.int32) for text in texts]
    logits = {}
    for name, attention, dtype in (
        ("float64", "eager", torch.float64),
        ("eager", "eager", torch.float32),
        ("sdpa", "sdpa", torch.float32),
    ):
        theirs = peer(file, attention, dtype)
        with torch.no_grad():
            logits[name] = [theirs(torch.from_numpy(x).long()).logits[0].numpy() for x in ids]
    for how in (AT_ONCE, IN_PIECES):
        with dense_products(how):
            apply = jax.jit(lambda params, ids: model.apply(params, ids)[0])
            logits[how] = [np.asarray(apply(model.params, x))[0] for x in ids]
    pairs = [(a, b) for a in ("eager", "float64") for b in (AT_ONCE, IN_PIECES, "sdpa", "eager")]
    pairs.remove(("eager", "eager"))
    print("tokens  " + "".join(f"{b + ' - ' + a:>22}" for a, b in pairs))
    table = np.array(
        [[np.abs(logits[a][i] - logits[b][i]).max() for a, b in pairs] for i in range(len(ids))]
    )
    for x, row in zip(ids, table, strict=True):
        print(f"{x.shape[1]:6}  " + "".join(f"{value * 1e4:22.2f}" for value in row))
    rms = [
        np.sqrt(np.mean([np.mean((logits[a][i] - logits[b][i]) ** 2) for i in range(len(ids))]))
        for a, b in pairs
    ]
    print("rms     " + "".join(f"{value * 1e4:22.3f}" for value in rms))
    print("within  " + "".join(f"{f'{n} of {len(ids)}':>22}" for n in (table <= 1e-4).sum(0)))


def costs(model: qj.Model) -> None:
    """Of hidden states in one program, the two ways by turns; the fastest of five."""
    print("rows            at once     in pieces   time   temporary memory")
    for shape in SHAPES:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, shape).astype(np.int32)
        programs = {}
        for how in (AT_ONCE, IN_PIECES):
            with dense_products(how):
                hidden = jax.jit(lambda params, ids: model.hidden(params, ids)[0])
                programs[how] = hidden.lower(model.params, ids).compile()
        best = dict.fromkeys(programs, float("inf"))
        for _ in range(6):
            for how, program in programs.items():
                start = time.perf_counter()
                program(model.params, ids).block_until_ready()
                best[how] = min(best[how], time.perf_counter() - start)
        memory = {how: p.memory_analysis().temp_size_in_bytes / 1e6 for how, p in programs.items()}
        ratio = best[IN_PIECES] / best[AT_ONCE]
        print(
            f"{shape[0]} x {shape[1]:<6} {best[AT_ONCE] * 1e3:9.1f} ms "
            f"{best[IN_PIECES] * 1e3:9.1f} ms  {ratio:5.2f}"
            f"   {memory[AT_ONCE]:.0f} and {memory[IN_PIECES]:.0f} MB"
        )


def main() -> None:
    file = Path(smollm2.gguf())
    model = qj.load(file)
    differences(model, file, texts_of(sys.argv[1:]))
    costs(model)


if __name__ == "__main__":
    main()
