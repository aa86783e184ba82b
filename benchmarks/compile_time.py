"""How long the train step takes to compile as the model gets deeper; layers are scanned.

    python -m benchmarks.compile_time [--layers 4 16 64] [--repeats 3]

From abstract weights: nothing is allocated. Tracing with lowering, and compiling, are shown apart.
"""

import argparse
import statistics
import time

import jax

from benchmarks import abstract


def once(layers: int) -> tuple[float, float]:
    """Seconds to trace and lower, and to compile, with nothing cached."""
    step, arguments = abstract.train_step(abstract.config(layers), batch=4, time=256)
    jax.clear_caches()
    start = time.perf_counter()
    lowered = step.lower(*arguments)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    once(options.layers[0])  # first use of everything: imports, the compiler's own set-up
    runs: dict[int, list[tuple[float, float]]] = {layers: [] for layers in options.layers}
    for _ in range(options.repeats):
        for layers in options.layers:
            runs[layers].append(once(layers))

    print("| layers | trace and lower, s | compile, s | both, s | relative |")
    print("|---|---|---|---|---|")
    base = None
    for layers, times in runs.items():
        lower, build = (statistics.median(column) for column in zip(*times, strict=True))
        total = statistics.median(map(sum, times))
        base = base or total
        print(f"| {layers} | {lower:.2f} | {build:.2f} | {total:.2f} | {total / base:.2f} |")


if __name__ == "__main__":
    main()
