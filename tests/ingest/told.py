"""A progress that keeps what it is told."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from annatac_scale.progress import Advance


class Said:
    """A Progress that keeps the lines, and what it was told of the work of each sample."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done = 0
        self.found = 0
        self.n_lines = 0
        self.samples: dict[str, int] = {}
        self.finished: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def task(
        self, name: str, total: int | None, unit: str, samples: Mapping[str, int] | None = None
    ) -> Iterator[Advance]:
        self.samples = dict(samples or {})
        assert sum(self.samples.values()) == total
        yield _Told(self)

    def __contains__(self, part: str) -> bool:
        return any(part in line for line in self.lines)


class _Told(Advance):
    def __init__(self, said: Said) -> None:
        self.said = said
        self.lock = threading.Lock()

    def __call__(self, n: int, lines: int = 0, sample: str = "") -> None:
        with self.lock:
            self.said.done += n
            self.said.n_lines += lines

    def found(self, n: int, sample: str = "") -> None:
        with self.lock:
            self.said.found += n

    def finished(self, sample: str) -> None:
        self.said.finished.append(sample)
