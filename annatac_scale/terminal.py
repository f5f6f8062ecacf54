"""How the command line shows progress: bars on a terminal, now and then a plain line elsewhere."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from annatac_scale.progress import Advance
from annatac_scale.progress_lines import Clock, Work, percent, short

_MOST_SAMPLES_SHOWN = 5
_NAME_WIDTH, _BAR_WIDTH = 28, 24


class TerminalProgress:
    """Shows tasks on standard error; results belong on standard output.

    On a terminal all tasks that run are drawn together, with the samples at work below theirs. In batch jobs and logs a
    task says a line at most every half minute. A finished sample gets a line on both.
    """

    def __init__(self, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._clock = clock
        self._works: list[Work] = []
        self._lock = threading.Lock()
        self._live: Live | None = None

    def say(self, line: str) -> None:
        """Print a line above the bars, as it is."""
        self.console.print(line, markup=False, emoji=False)

    @contextmanager
    def task(
        self, name: str, total: int | None, unit: str, samples: Mapping[str, int] | None = None
    ) -> Iterator[Advance]:
        """Show a task while it runs."""
        draws = self.console.is_terminal and not self.console.is_dumb_terminal
        work = Work(name, total, unit, samples or {}, self.say, self._clock, says_how_far=not draws)
        if not draws:
            yield work
            return
        self._begin(work)
        try:
            yield work
        finally:
            self._end(work)

    def _begin(self, work: "Work") -> None:
        with self._lock:
            self._works.append(work)
            if self._live is None:
                self._live = Live(
                    get_renderable=self._drawn, console=self.console, transient=True, refresh_per_second=4
                )
                self._live.start()

    def _end(self, work: "Work") -> None:
        with self._lock:
            self._works.remove(work)
            if self._live is not None and not self._works:
                self._live.stop()
                self._live = None

    def _drawn(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True, max_width=_NAME_WIDTH)
        table.add_column(no_wrap=True, width=_BAR_WIDTH)
        table.add_column(no_wrap=True)
        for work in list(self._works):
            for row in _rows(work):
                table.add_row(*row)
        return table


def _rows(work: Work) -> Iterator[tuple[RenderableType, ...]]:
    """A task's own row, and those of the samples that it works on."""
    yield Text(work.name), _bar(work.done, work.total), Text(" · ".join(work.facts()))
    active = work.at_work()
    for name, part in active[:_MOST_SAMPLES_SHOWN]:
        facts = [percent(part.done, part.total)] if part.total else []
        facts += [short(part.rate, "lines/s")] if part.rate else []
        yield Text(f"  {name}"), _bar(part.done, part.total), Text(" · ".join(facts))
    if len(active) > _MOST_SAMPLES_SHOWN:
        yield (Text(f"  and {len(active) - _MOST_SAMPLES_SHOWN:,} more"),)


def _bar(done: int, total: int | None) -> ProgressBar:
    return ProgressBar(total=total or None, completed=done, width=_BAR_WIDTH, pulse=not total)
