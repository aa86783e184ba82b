"""A QLoRA train step of Llama 2 7B's shapes on the device at hand, beside PEFT + bitsandbytes.

    python -m benchmarks.train_step [--shapes 1x512 4x2048 1x16384] [--attention cudnn] [--steps 10]
    python -m benchmarks.train_step --layers 2 --hidden 256 --shapes 2x128     # tries it on a CPU

Random weights, the same for all; rank 64 on every linear weight but the head, AdamW, gradients
clipped, every token labelled, layers computed again in the backward pass (--remat full; the peers'
gradient checkpointing). bf16 on an accelerator, fp32 on a CPU. Every contender runs in a process
of its own, in turn, so that each has the device's memory to itself.

tokens/s  of all B x T tokens, by the median of the steps after the warm-up
MFU       model FLOP a second, as `model_flop` counts them, of the device's peak for dense bf16
peak      of device memory: what the allocator of JAX or torch gave out at most, without what either
          keeps in reserve; JAX's includes loading. On a CPU the resident set of the process

Needs torch, transformers, PEFT and bitsandbytes beside qlora-jax: the environment that `make
parity` makes, with the CUDA builds of JAX and torch. Unsloth is a contender where it is installed.
Contenders run in the order given, and those after PEFT are compared with it.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import cpu_train_step, peer_step
from benchmarks.children import ask

NF4, DENSE = "qlora-jax NF4", "qlora-jax dense"
PEFT, UNSLOTH = "PEFT + bitsandbytes NF4", "Unsloth NF4"
CONTENDERS = (PEFT, UNSLOTH, NF4, DENSE)  # the peer first: the others are compared with it
WARM_UP = 3

PEAKS = {
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
    "L40S": 362e12,
    "L4": 121e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Part of a device's name -> its maker's FLOP/s, dense bf16 summed in fp32; the first that fits."""


def model_flop(model: dict[str, int], rank: int, batch: int, time: int) -> float:
    """What one step needs, however it is computed: nothing is counted twice for rematerialization.

    A frozen weight [K, N] takes 4 K N a token (forward, and the gradient of its input), A and B
    6 R (K + N). Causal attention takes 2 T^2 D a layer and sequence forward, half the squares of
    Q K^T and of P V, and twice that backward.
    """
    d, inner, layers = model["hidden"], model["inner"], model["layers"]
    shapes = [(d, d)] * 4 + [(d, inner)] * 2 + [(inner, d)]
    frozen = layers * sum(k * n for k, n in shapes) + d * model["vocabulary"]
    adapters = layers * sum(rank * (k + n) for k, n in shapes)
    attention = 6 * layers * d * time**2
    return batch * (time * (4 * frozen + 6 * adapters) + attention)


def config(model: dict[str, int], context: int) -> dict[str, Any]:
    """The config.json of such a Llama."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": model["vocabulary"],
        "hidden_size": model["hidden"],
        "intermediate_size": model["inner"],
        "num_hidden_layers": model["layers"],
        "num_attention_heads": model["heads"],
        "num_key_value_heads": model["heads"],
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def prepare(job: dict[str, Any]) -> tuple[Callable[[], float], Callable[[], int]]:
    """A function that takes one step and returns its loss, and one for the peak of memory."""
    batch, length = job["shape"]
    folder, rank, device = Path(job["folder"]), job["rank"], job["device"]
    if job["contender"] in (PEFT, UNSLOTH):
        import torch

        make = peer_step.prepare if job["contender"] == PEFT else peer_step.prepare_unsloth
        step = make(
            folder,
            batch,
            length,
            rank,
            device="cpu" if device == "cpu" else "cuda",
            dtype=torch.float32 if device == "cpu" else torch.bfloat16,
            checkpointing=job["remat"] != "none",
        )
        if device == "cpu":
            return step, cpu_train_step.peak_memory
        torch.cuda.reset_peak_memory_stats()
        return step, torch.cuda.max_memory_allocated

    import jax

    step = cpu_train_step.prepare_ours(
        folder,
        job["contender"] == NF4,
        batch,
        length,
        rank=rank,
        remat=job["remat"],
        dtype="float32" if device == "cpu" else "bfloat16",
    )
    if device == "cpu":
        return step, cpu_train_step.peak_memory
    return step, lambda: jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


def child(job: dict[str, Any]) -> dict[str, Any]:
    """One contender at one shape, in this process."""
    from qlora_jax.models.attention import use_attention

    step, peak = prepare(job)
    with use_attention(job["attention"]):
        losses = [step() for _ in range(WARM_UP)]
    seconds = []
    for _ in range(job["steps"]):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "peak": peak(), "loss": losses[0]}


def look() -> dict[str, str]:
    """The device that JAX takes: its platform and name."""
    import jax

    device = jax.local_devices()[0]
    return {"platform": device.platform, "kind": device.device_kind}


def spawn(job: Any) -> dict[str, Any]:
    """`child` in a fresh interpreter, or `look`."""
    return ask("benchmarks.train_step", "--child", json.dumps(job))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--shapes", nargs="+", default=["1x512", "4x2048", "1x16384"], metavar="BxT"
    )
    here = [name for name in CONTENDERS if name != UNSLOTH or importlib.util.find_spec("unsloth")]
    parser.add_argument("--contenders", nargs="+", default=here, choices=CONTENDERS)
    parser.add_argument("--attention", help="ours: xla, splash or cudnn (default: the platform's)")
    parser.add_argument("--remat", default="full", help="ours: see qlora_jax/models/remat.py")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each process")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(look() if options.child == "look" else child(options.child)))
        return

    model = {
        "layers": options.layers,
        "hidden": options.hidden,
        "inner": {4096: 11008}.get(options.hidden, 11 * options.hidden // 4),
        "heads": options.hidden // 128,
        "vocabulary": 32000,
    }
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    device = spawn("look")
    peak = next((flops for name, flops in PEAKS.items() if name in device["kind"]), None)
    print(f"{device['kind']}: {model}, rank {options.rank}\n")
    print("| batch | contender | tokens/s | of peer | MFU | peak GiB | of peer | first loss |")
    print("|---" * 8 + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        peer_step.save_random(config(model, max(t for _, t in shapes)), Path(folder))
        job = {
            "folder": folder,
            "rank": options.rank,
            "device": device["platform"],
            "attention": options.attention,
            "remat": options.remat,
            "steps": options.steps,
        }
        for shape in shapes:
            peer = None
            for name in options.contenders:
                run = spawn(job | {"contender": name, "shape": shape})
                peer = run if name == PEFT and "failed" not in run else peer
                work = model_flop(model, options.rank, *shape)
                if "failed" in run:
                    cells = f"{run['failed']} | | | | |"
                else:
                    cells = measured(run, peer, shape[0] * shape[1], work, peak)
                print(f"| {shape[0]}x{shape[1]} | {name} | {cells} |", flush=True)


def measured(
    run: dict[str, Any], peer: dict[str, Any] | None, tokens: int, flop: float, peak: float | None
) -> str:
    """The last six cells of a row; a step has so many tokens and FLOP."""
    seconds = statistics.median(run["seconds"])
    faster = smaller = ""
    if peer is not None:
        faster = f"{statistics.median(peer['seconds']) / seconds:.2f}"
        smaller = f"{run['peak'] / peer['peak']:.2f}"
    use = f"{flop / seconds / peak:.1%}" if peak else f"{flop / seconds / 1e9:.0f} GFLOP/s"
    return (
        f"{tokens / seconds:.0f} | {faster} | {use} | {run['peak'] / 2**30:.2f} | {smaller} "
        f"| {run['loss']:.3f}"
    )


if __name__ == "__main__":
    main()
