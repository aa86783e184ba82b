"""A plan's bars, on the terminal and in a file."""

from pathlib import Path

from qlora_jax.errors import QloraError, missing
from qlora_jax.plan.devices import GIB
from qlora_jax.plan.planner import Plan
from qlora_jax.plan.report import findings, footnotes, gib, headline, sizes, verdict

BAR = 40
"""Characters of the longest bar: all that the device has room for, or, if more, the total."""


def show(plan: Plan) -> None:
    """Prints the plan. Raises QloraError without rich."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError as error:
        raise missing("rich", "showing a plan", "cli") from error
    console = Console(highlight=False)
    lines = headline(plan)
    console.print(lines[0], style="bold", soft_wrap=True, markup=False)
    console.print(lines[1], soft_wrap=True, markup=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    scale = max(plan.device.room, plan.footprint.total)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for label, size in sizes(plan.footprint).items():
        table.add_row(label, gib(size), Text(bar(size / scale), style="cyan"))
    console.print()
    console.print(table)
    color = "green" if plan.fits else "red"
    console.print()
    console.print(verdict(plan), style=f"bold {color}", soft_wrap=True, markup=False)
    console.print()
    found = findings(plan)
    for line in [*found, *([""] if found else []), *footnotes(plan)]:
        console.print(line, soft_wrap=True, markup=False)


def bar(share: float, width: int = BAR) -> str:
    """`share` of `width` characters, to an eighth of one; never nothing for something."""
    eighths = max(1, round(share * width * 8))
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def plot(plan: Plan, path: Path) -> None:
    """Draws the parts and the device's room into an image. Raises QloraError without matplotlib,
    and for a kind of file that it cannot write."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing("matplotlib", "drawing a plan", "cli") from error
    parts = {label: size / GIB for label, size in sizes(plan.footprint).items()}
    figure = Figure(figsize=(8, 0.45 * len(parts) + 2), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for row, (label, size) in enumerate(parts.items()):
        bars = axes.barh(row, size, left=left)
        axes.bar_label(bars, labels=[f" {label} {size:.2f}"], label_type="edge", fontsize=8)
        left += size
    axes.axvline(plan.device.room / GIB, color="black", linestyle="--", linewidth=1)
    axes.set_xlim(0, 1.35 * max(left, plan.device.room / GIB))
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlabel(f"GiB (dashed: what there is of {plan.device.title})")
    axes.set_title(f"{headline(plan)[1]}\n{verdict(plan)}", fontsize=9)
    try:
        figure.savefig(path)
    except ValueError as error:  # of what suffixes there are
        raise QloraError(f"--plot {path}: {error}") from error
