"""Signals that end a run early, with what it has saved."""

import signal
import threading
from typing import Any


class Interrupts:
    """Within the block a first Ctrl-C is only noted; a second one raises KeyboardInterrupt.

    An exception in the middle of a step would lose the run: the old state is donated, and the new
    one not yet ours. Python takes signals in its main thread, so elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.caught = False
        self._ours = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Interrupts":
        if self._ours:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._ours:
            # None: a handler that was not installed from Python, and cannot be from here.
            signal.signal(signal.SIGINT, self._before or signal.SIG_DFL)

    def _note(self, *_: Any) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = True
