"""How long work tells how far it is: library functions report, the command line draws."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Adds work done; may be called from any thread."""


class Progress(Protocol):
    """What a long function reports to."""

    def say(self, line: str) -> None:
        """Print one line."""

    def task(self, name: str, total: int | None, unit: str) -> AbstractContextManager[Advance]:
        """Begin a task of ``total`` units (None when unknown), ended with the context."""
        ...


class Silent:
    """Reports nothing: the default of every library function."""

    def say(self, line: str) -> None:
        """Say nothing."""

    @contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Count nothing."""
        yield lambda n: None
