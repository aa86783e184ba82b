"""The loss of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path

from qlora_jax.errors import missing


def plot_losses(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Training loss of every step, its running mean, and the held-out loss, as a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing("matplotlib", f"drawing {path}", "cli") from error
    trained = [(e["step"], e["loss"]) for e in history if "loss" in e]
    held_out = [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
        axes.plot(steps, _running_mean(losses), color="tab:blue", label="running mean")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if trained or held_out:
        axes.legend()
    figure.savefig(path, dpi=150)


def _running_mean(values: Sequence[float], weight: float = 0.9) -> list[float]:
    means, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        means.append(total / norm)
    return means
