"""Ctrl-C and SIGTERM that wait for a place where everything is whole (standard library only)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether the process has been asked to stop since the work began."""

    def __init__(self) -> None:
        self.requested = False

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        """The signal handler: remember the first, obey the second."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def raise_if_requested(self) -> None:
        """Stop here, where the state is whole."""
        if self.requested:
            raise KeyboardInterrupt


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Let Ctrl-C and SIGTERM wait for the end of a step: half a step leaves half-updated weights.

    Both end in a KeyboardInterrupt. Outside the main thread, where no handler can be set, nothing
    is deferred.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, interrupt.handle) for number in signals}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
