"""How long work tells how far it is: library functions report, the command line draws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """What a long function reports to. ``say`` prints one line; ``task`` yields a function that adds work done."""

    def say(self, line: str) -> None: ...

    def task(self, name: str, total: int | None, unit: str) -> "Task": ...


class Task(Protocol):
    """A context manager that yields ``advance(n)``; ``advance`` may be called from any thread."""

    def __enter__(self) -> Advance: ...

    def __exit__(self, *exc: object) -> bool | None: ...


class Silent:
    """Reports nothing: the default of every library function."""

    def say(self, line: str) -> None:
        return None

    @contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        yield lambda n: None
