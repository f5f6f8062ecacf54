"""Signals that ask a run to end: it keeps its state after the step at work, and leaves."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from annatac_scale.errors import RunInterruptedError

ASKING = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Whether somebody asked this process to end, and by which signal."""

    def __init__(self) -> None:
        self.signal = 0
        self.is_heeded = False

    def ask(self, number: int) -> None:
        """Ask, from any thread."""
        self.signal = number

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """For the time of the context whoever works looks at ``signal`` now and then; else asking ends it at once."""
        self.is_heeded = True
        try:
            yield
        finally:
            self.is_heeded = False


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Take SIGTERM and Ctrl-C as a request for the time of the context.

    Raises RunInterruptedError where nobody heeds it, and at a second Ctrl-C. Outside of the main thread, where Python
    hands out no signals, nothing is ever asked.
    """
    asked = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def take(number: int, _frame: FrameType | None) -> None:
        again = number == signal.SIGINT and asked.signal
        asked.ask(number)
        if again or not asked.is_heeded:
            raise KeyboardInterrupt  # which no handler of errors on the way takes for one

    before = {number: signal.signal(number, take) for number in ASKING}
    try:
        yield asked
    except KeyboardInterrupt as error:
        if not asked.signal:
            raise
        raise RunInterruptedError(
            "interrupted; the same command goes on after what is kept", asked.signal
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
