"""Seconds that `import qlora_jax` takes beyond jax, flax and optax (aim: under 2).

python -m benchmarks.import_time [--repeats 5]
"""

import argparse
import statistics
import subprocess
import sys

BASE = "import jax, flax.nnx, optax, numpy"
TIMED = """
import time
start = time.perf_counter()
{first}
middle = time.perf_counter()
import qlora_jax
print(middle - start, time.perf_counter() - middle)
"""


def once() -> tuple[float, float]:
    """Seconds for the libraries below and for ours, in a fresh interpreter."""
    code = TIMED.format(first=BASE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    below, ours = map(float, done.stdout.split())
    return below, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    once()  # byte-compiles what is not yet
    below, ours = zip(*(once() for _ in range(options.repeats)), strict=True)
    print(f"jax, flax, optax: {statistics.median(below):.2f} s")
    print(f"qlora_jax on top: {statistics.median(ours):.2f} s (worst {max(ours):.2f} s)")


if __name__ == "__main__":
    main()
