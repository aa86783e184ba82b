"""A progress bar over the tensors of a checkpoint."""

import contextlib
from collections.abc import Callable, Iterator

from qlora_jax.checkpoints.names import OnTensor
from qlora_jax.errors import missing


@contextlib.contextmanager
def counting() -> Iterator[Callable[[str], OnTensor]]:
    """Gives a function that begins a bar of a name, and returns what is to be called as `OnTensor`.

    Nothing is shown where stdout is no terminal.
    """
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ModuleNotFoundError as error:
        raise missing("rich", "showing progress", "cli") from error
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tensors, left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def begin(name: str) -> OnTensor:
            task = bar.add_task(name, total=None)

            def on_tensor(total: int) -> None:
                bar.update(task, total=total, advance=1)

            return on_tensor

        yield begin
