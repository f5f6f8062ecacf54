"""How long work tells how far it is: library functions report, the command line draws."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance:
    """Takes the work done in a task; this one counts nothing. All of it may be called from any thread."""

    def __call__(self, n: int, lines: int = 0, sample: str = "") -> None:
        """Add ``n`` units done in this run, and the lines of input they held, as work of ``sample``."""

    def found(self, n: int, sample: str = "") -> None:
        """Add ``n`` units that an earlier run had done: they count as done, but say nothing about speed."""

    def finished(self, sample: str) -> None:
        """Note that a sample is complete."""


class Progress(Protocol):
    """What a long function reports to."""

    def say(self, line: str) -> None:
        """Print one line."""

    def task(
        self, name: str, total: int | None, unit: str, samples: Mapping[str, int] | None = None
    ) -> AbstractContextManager[Advance]:
        """Begin a task of ``total`` units (None when unknown), ended with the context; tasks may run side by side.

        samples: the units of each sample, where the task works through samples; their sum is ``total``
        """
        ...


class Silent:
    """Reports nothing: the default of every library function."""

    def say(self, line: str) -> None:
        """Say nothing."""

    @contextmanager
    def task(
        self, name: str, total: int | None, unit: str, samples: Mapping[str, int] | None = None
    ) -> Iterator[Advance]:
        """Count nothing."""
        yield Advance()


def duration(seconds: float) -> str:
    """About how long, no finer than anybody can tell: ``about 40 s``, ``about 12 min``, ``about 3 h 20 min``."""
    if seconds < 57.5:
        return f"about {max(5 * round(seconds / 5), 5)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} min"
    hours, minutes = divmod(10 * round(minutes / 10), 60)
    if hours < 48:
        return f"about {hours} h {minutes} min" if minutes else f"about {hours} h"
    return f"about {round(hours / 24)} days"
