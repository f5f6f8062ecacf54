"""Signals that ask a run to end: it keeps its state after the step at work, and leaves."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Whether somebody asked this process to end, and by which signal."""

    def __init__(self) -> None:
        self.signal = 0

    def ask(self, number: int) -> None:
        """Ask, from any thread."""
        self.signal = number


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Take SIGTERM and Ctrl-C as a request for the time of the context; a second Ctrl-C interrupts at once.

    Outside of the main thread, where Python hands out no signals, nothing is ever asked.
    """
    asked = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def take(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and asked.signal:
            raise KeyboardInterrupt
        asked.ask(number)

    before = {number: signal.signal(number, take) for number in ASKING}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
