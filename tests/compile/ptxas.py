"""What ptxas says of each CUDA kernel, read from a build's log.

    python -m tests.compile.ptxas build.log

A line for each kernel with, for each architecture, registers of a thread and bytes spilled.
Fails if the log names no kernel, or if one spills many. (Turing never runs the kernels of 128 rows,
whose tiles do not fit into its shared memory.)
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ALLOWED = 128  # bytes: some registers outside the inner loop


def main(log: Path) -> int:
    text = subprocess.run(
        ["c++filt"], input=log.read_text(), check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for section in text.split("Compiling entry function '")[1:]:
        name, arch = re.match(r"(.*?)' for '(\w+)'", section).groups()
        kernel = re.search(r"(\w+<.*>)\(", name)[1].replace("(qlora::Dtype)", "")
        registers = int(re.search(r"Used (\d+) registers", section)[1])
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", section)))
        found[kernel][arch] = (registers, spilled)
    if not found:
        print(f"{log} names no kernel")
        return 1
    archs = sorted({arch for row in found.values() for arch in row}, key=lambda a: (len(a), a))
    print(f"| kernel <dtype (1 bf16, 2 fp16), ...> | {' | '.join(archs)} |")
    print("|---" * (len(archs) + 1) + "|")
    for kernel, row in sorted(found.items()):
        cells = (f"{r}" + (f", {s} B spilled" if s else "") for r, s in (row[a] for a in archs))
        print(f"| {kernel} | {' | '.join(cells)} |")
    worst = max(spilled for row in found.values() for _, spilled in row.values())
    print(f"{len(found)} kernels for {len(archs)} architectures; at most {worst} bytes spilled")
    return worst > ALLOWED


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    raise SystemExit(main(Path(sys.argv[1])))
