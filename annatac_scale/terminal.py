"""How the command line shows progress: bars on a terminal, now and then a plain line elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from annatac_scale.progress import Advance, duration

PLAIN_LINE_EVERY_S = 30.0
_MOST_SAMPLES_SHOWN = 5
_PREFIXES = ("", "k", "M", "G", "T")
_NAME_WIDTH, _BAR_WIDTH = 28, 24

Clock = Callable[[], float]


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


@dataclass
class _SampleWork:
    """What is done of a sample; its speed is told by what came after the first time that it was heard of."""

    total: int | None
    heard: float
    last: float
    done: int = 0
    lines: int = 0
    lines_at_first: int = 0

    @property
    def rate(self) -> float:
        """Lines a second; 0 where it cannot be told yet."""
        return (
            (self.lines - self.lines_at_first) / (self.last - self.heard) if self.last > self.heard else 0.0
        )


@dataclass
class Work(Advance):
    """A task at work: what is done of it, how fast, how long it will take."""

    name: str
    total: int | None
    unit: str
    samples: Mapping[str, int]
    say: Callable[[str], None]
    clock: Clock
    says_how_far: bool
    done: int = 0
    n_found: int = 0
    lines: int = 0
    n_finished: int = 0
    active: dict[str, _SampleWork] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._began = self._said = self.clock()

    def __call__(self, n: int, lines: int = 0, sample: str = "") -> None:
        """Add work done in this run."""
        now = self.clock()
        with self._lock:
            self.done += n
            self.lines += lines
            if sample:
                self._add(sample, n, lines, now)
            due = self.says_how_far and now - self._said >= PLAIN_LINE_EVERY_S
            if due:
                self._said = now
        if due:
            self.say(f"{self.name}: {' · '.join(self.facts())}")

    def found(self, n: int, sample: str = "") -> None:
        """Add work of an earlier run."""
        with self._lock:
            self.done += n
            self.n_found += n
            if sample:
                self._add(sample, n, 0, self.clock())

    def finished(self, sample: str) -> None:
        """Say that a sample is complete."""
        with self._lock:
            self.n_finished += 1
            work = self.active.pop(sample, None)
            facts = [f"done, {self.n_finished:,} of {len(self.samples):,}"]
        if work is not None and work.lines:
            facts.append(_short(work.lines, "lines"))
        if work is not None and work.rate:
            facts.append(_short(work.rate, "lines/s"))
        self.say(f"{sample}: {' · '.join(facts)}")

    def _add(self, sample: str, n: int, lines: int, now: float) -> None:
        if sample not in self.active:
            self.active[sample] = _SampleWork(self.samples.get(sample), now, now, lines_at_first=lines)
        work = self.active[sample]
        work.done += n
        work.lines += lines
        work.last = now

    def at_work(self) -> list[tuple[str, _SampleWork]]:
        """The samples that were heard of and are not finished, the first ones first."""
        with self._lock:
            return sorted(self.active.items(), key=lambda item: item[1].heard)

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at the speed of this run; None where nothing tells."""
        elapsed, done = self.clock() - self._began, self.done - self.n_found
        if self.total is None or done <= 0 or elapsed <= 0:
            return None
        return max(self.total - self.done, 0) * elapsed / done

    def facts(self) -> list[str]:
        """How far the task is, in words."""
        elapsed = self.clock() - self._began
        facts = [] if not self.total else [_percent(self.done, self.total)]
        if self.samples:
            facts.append(f"{self.n_finished:,} of {len(self.samples):,} samples")
        else:
            facts.append(_amount(self.done, self.total, self.unit))
        if self.lines and elapsed > 0:
            facts.append(_short(self.lines / elapsed, "lines/s"))
        left = self.seconds_left
        return facts if left is None else [*facts, f"{duration(left)} left"]


def _rows(work: Work) -> Iterator[tuple[RenderableType, ...]]:
    """A task's own row, and those of the samples that it works on."""
    yield Text(work.name), _bar(work.done, work.total), Text(" · ".join(work.facts()))
    active = work.at_work()
    for name, part in active[:_MOST_SAMPLES_SHOWN]:
        facts = [_percent(part.done, part.total)] if part.total else []
        facts += [_short(part.rate, "lines/s")] if part.rate else []
        yield Text(f"  {name}"), _bar(part.done, part.total), Text(" · ".join(facts))
    if len(active) > _MOST_SAMPLES_SHOWN:
        yield (Text(f"  and {len(active) - _MOST_SAMPLES_SHOWN:,} more"),)


def _bar(done: int, total: int | None) -> ProgressBar:
    return ProgressBar(total=total or None, completed=done, width=_BAR_WIDTH, pulse=not total)


def _percent(done: int, total: int) -> str:
    """A share in whole percents: 100% only where nothing is left."""
    return f"{min(done * 100 // total, 100)}%"


def _amount(done: int, total: int | None, unit: str) -> str:
    if unit == "B":
        return _short(done, unit) if total is None else f"{_short(done, unit)} of {_short(total, unit)}"
    return f"{done:,} {unit}" if total is None else f"{done:,} of {total:,} {unit}"


def _short(number: float, unit: str) -> str:
    """A number with two or three digits: 850 B, 1.2 GB, 4.2 M lines/s."""
    power = 0
    while number >= 999.5 and power < len(_PREFIXES) - 1:
        number /= 1000
        power += 1
    digits = 1 if power and number < 99.95 else 0
    space = "" if unit == "B" or not power else " "
    return f"{number:.{digits}f} {_PREFIXES[power]}{space}{unit}"
