"""What a run tells while it goes: lines in a file, and a bar on the terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from qlora_jax.checkpoints.folder import new_file
from qlora_jax.errors import missing


class MetricsFile:
    """JSON lines, each written out at once, so that a killed run keeps what it had.

    until: the step that a run goes on from, after which lines that are there are dropped; 0: a new
    run. write: False in all processes of a run but the first. history: all lines.
    """

    def __init__(self, path: Path, until: int = 0, *, write: bool = True) -> None:
        self.history: list[dict[str, float]] = []
        if until:
            self.history = [entry for entry in _read_lines(path) if entry["step"] <= until]
        if write:
            with new_file(path) as part:
                part.write_text("".join(map(_line, self.history)), encoding="utf-8")
        self._file = (path if write else Path(os.devnull)).open("a", encoding="utf-8")

    def add(self, **entry: float) -> None:
        """Appends one line."""
        self.history.append(entry)
        self._file.write(_line(entry))
        self._file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def _line(entry: dict[str, float]) -> str:
    return json.dumps(entry) + "\n"


def _read_lines(path: Path) -> Iterator[dict[str, float]]:
    """The entries of a file that a run may have been killed while writing to."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


class Progress:
    """A bar with step, loss, tokens per second, memory, the share of time that input took, and the
    time left.

    Where stdout is no terminal, a line at every tenth of the run instead. taken: steps of it that
    were taken before.
    """

    def __init__(self, steps: int, taken: int = 0) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar
        except ModuleNotFoundError as error:
            raise missing("rich", "showing progress", "cli") from error
        self._steps, self._taken, self._loss = steps, taken, float("nan")
        self._waited = self._seconds = 0.0
        self._console = Console()
        self._bar = Bar(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=steps, completed=taken)
        self._began = time.perf_counter()

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def step(self, number: int, entry: dict[str, float]) -> None:
        """After step `number`, counted from 1."""
        # Smoothed, since the loss of a single batch says little.
        loss = entry.get("loss", self._loss)  # a skipped step may have none
        self._loss = loss if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * loss
        self._waited += entry["input_seconds"]
        self._seconds += entry["seconds"]
        text = (
            f"loss {self._loss:.3f}  {entry['tokens_per_second']:,.0f} tokens/s  "
            f"{entry['memory_bytes'] / 1e9:.2f} GB  input {self._waited / self._seconds:.0%}"
        )
        self._bar.update(self._task, completed=number, description=text)
        tenth = max(self._steps // 10, 1)
        if not self._console.is_terminal and (number % tenth == 0 or number == self._steps):
            passed = time.perf_counter() - self._began
            left = passed / (number - self._taken) * (self._steps - number)
            self.say(f"step {number}/{self._steps}  {text}  {passed:.0f} s, {left:.0f} s left")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class Silence:
    """The same, showing nothing."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def step(self, number: int, entry: dict[str, float]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


def peak_memory() -> int:
    """Bytes: of the accelerator if it says, else the peak of this process's resident set."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux
