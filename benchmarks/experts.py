"""The experts of a mixture in 4 bits with adapters, beside ways that compute all of them.

    python -m benchmarks.experts [--experts 16] [--chosen 2] [--width 256] [--hidden 512]

One layer, fp32, on this machine. Each way computes the same function: "groups" as the library does
(tokens sorted by expert, each group multiplied with its own weight), "all experts" by a scan over
experts that sends every token through each and multiplies it by a weight that is mostly zero.
Training is the loss with its gradient by inputs and adapters; decoding is the layer for one token.
Seconds are the least of `--rounds` runs, in turn; the last column says how many times as long
"all experts" takes.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import qlora_jax as qj
from qlora_jax.models.experts import SparseMLP

Layer = Callable[[Any, jax.Array], jax.Array]


def make_layers(options: argparse.Namespace) -> tuple[dict[str, Layer], Any]:
    """(name -> layer of (parameters, x [1, T, D])), the parameters: quantized, and adapted."""
    model = SparseMLP(
        width=options.width,
        hidden=options.hidden,
        experts=options.experts,
        chosen=options.chosen,
        renormalize=True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(model)

    def groups(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x)

    def all_experts(params: Any, x: jax.Array) -> jax.Array:
        probabilities = jax.nn.softmax(x @ params["router"]["kernel"], axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, options.chosen)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)

        @jax.checkpoint
        def step(total: jax.Array, xs: Any) -> tuple[jax.Array, None]:
            number, expert = xs
            gate, up = (x @ expert[name]["kernel"] for name in ("gate_proj", "up_proj"))
            out = (jax.nn.silu(gate) * up) @ expert["down_proj"]["kernel"]
            weight = jnp.sum(jnp.where(chosen == number, weights, 0.0), axis=-1, keepdims=True)
            return total + out * weight, None

        numbers = jnp.arange(options.experts)
        return jax.lax.scan(step, jnp.zeros_like(x), (numbers, params["experts"]))[0]

    params = qj.quantize_tree(nnx.to_pure_dict(state), qj.NF4())
    layers = {"groups": groups, "all experts": all_experts}
    return {name: qj.lift(layer, strict=True) for name, layer in layers.items()}, params


def seconds(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least of `rounds` timings of each, after a first run that compiles."""
    best = dict.fromkeys(runs, float("inf"))
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    """Prints one line for training and one for decoding."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    for name, default in (("experts", 16), ("chosen", 2), ("width", 256), ("hidden", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    layers, params = make_layers(options)
    adapters = qj.lora.init(jax.random.key(0), params, qj.LoraConfig(rank=options.rank))
    adapters = jax.tree.map(lambda x: x + 0.01, adapters)

    def prepared(tokens: int, training: bool) -> dict[str, Callable[[], Any]]:
        x = jax.random.normal(jax.random.key(1), (1, tokens, options.width))

        def one(layer: Layer) -> Callable[[], Any]:
            def out(adapters: Any, x: jax.Array) -> jax.Array:
                return layer(qj.lora.attach(params, adapters), x)

            def loss(adapters: Any, x: jax.Array) -> jax.Array:
                return jnp.sum(out(adapters, x) ** 2)

            run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)) if training else out)
            return lambda: run(adapters, x)

        return {name: one(layer) for name, layer in layers.items()}

    print(f"{'':28}{'groups':>10}{'all experts':>14}{'ratio':>8}")
    for name, tokens, training in (("training", options.tokens, True), ("decoding", 1, False)):
        runs = prepared(tokens, training)
        took = seconds(runs, options.rounds)
        groups, everything = took["groups"], took["all experts"]
        ratio = everything / groups
        label = f"{name}, {tokens} tokens"
        print(f"{label:28}{groups * 1e3:8.1f}ms{everything * 1e3:12.1f}ms{ratio:8.1f}")


if __name__ == "__main__":
    main()
