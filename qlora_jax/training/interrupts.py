"""Signals that end a run early, with what it has saved."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupts:
    """Within the block Ctrl-C and SIGTERM are only noted; a second Ctrl-C raises KeyboardInterrupt.

    An exception in the middle of a step would lose the run: the old state is donated, and the new
    one not yet ours. Python takes signals in its main thread, so elsewhere this does nothing.

    With several processes a SIGTERM to any of them is noted by all after the same step, which they
    agree on through jax.distributed; each by itself would stop after a step of its own and leave
    the others waiting. Ctrl-C ends them.

    caught: the name of the first signal, "" before it.
    """

    def __init__(self) -> None:
        self.caught = ""
        in_main = threading.current_thread() is threading.main_thread()
        self._several = jax.process_count() > 1
        self._ours = in_main and not self._several

    def __enter__(self) -> "Interrupts":
        if self._ours:
            self._before = {number: signal.signal(number, self._note) for number in NAMES}
        return self

    def __exit__(self, *_: Any) -> None:
        if self._ours:
            for number, handler in self._before.items():
                # None: a handler that was not installed from Python, and cannot be from here.
                signal.signal(number, handler or signal.SIG_DFL)

    def agree(self, step: int) -> None:
        """Several processes call this after every step, and note a signal after the same one."""
        # JAX_ENABLE_PREEMPTION_SERVICE=false leaves signals to somebody else.
        asked = self._several and jax.config.values["jax_enable_preemption_service"]
        if asked and multihost_utils.reached_preemption_sync_point(step):
            self.caught = NAMES[signal.SIGTERM]

    def _note(self, number: int, _: Any) -> None:
        # Schedulers send SIGTERM more than once; what ends a run that does not stop is SIGKILL.
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = self.caught or NAMES[signal.Signals(number)]
