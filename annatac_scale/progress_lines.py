"""Progress in lines: what is done of a task, how fast, how long it will take, said now and then."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from annatac_scale.progress import Advance, duration

PLAIN_LINE_EVERY_S = 30.0
_PREFIXES = ("", "k", "M", "G", "T")

Clock = Callable[[], float]


class LineProgress:
    """Says lines, and of each task how far it is at most every half minute. say: takes a line, from any thread"""

    def __init__(self, say: Callable[[str], None], clock: Clock = time.monotonic) -> None:
        self._say, self._clock = say, clock

    def say(self, line: str) -> None:
        """Say the line."""
        self._say(line)

    @contextmanager
    def task(
        self, name: str, total: int | None, unit: str, samples: Mapping[str, int] | None = None
    ) -> Iterator[Advance]:
        """Say how far a task is while it runs."""
        yield Work(name, total, unit, samples or {}, self._say, self._clock)


@dataclass
class SampleWork:
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
    says_how_far: bool = True
    done: int = 0
    n_found: int = 0
    lines: int = 0
    n_finished: int = 0
    active: dict[str, SampleWork] = field(default_factory=dict)

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
            facts.append(short(work.lines, "lines"))
        if work is not None and work.rate:
            facts.append(short(work.rate, "lines/s"))
        self.say(f"{sample}: {' · '.join(facts)}")

    def _add(self, sample: str, n: int, lines: int, now: float) -> None:
        if sample not in self.active:
            self.active[sample] = SampleWork(self.samples.get(sample), now, now, lines_at_first=lines)
        work = self.active[sample]
        work.done += n
        work.lines += lines
        work.last = now

    def at_work(self) -> list[tuple[str, SampleWork]]:
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
        facts = [] if not self.total else [percent(self.done, self.total)]
        if self.samples:
            facts.append(f"{self.n_finished:,} of {len(self.samples):,} samples")
        else:
            facts.append(_amount(self.done, self.total, self.unit))
        if self.lines and elapsed > 0:
            facts.append(short(self.lines / elapsed, "lines/s"))
        left = self.seconds_left
        return facts if left is None else [*facts, f"{duration(left)} left"]


def percent(done: int, total: int) -> str:
    """A share in whole percents: 100% only where nothing is left."""
    return f"{min(done * 100 // total, 100)}%"


def _amount(done: int, total: int | None, unit: str) -> str:
    if unit == "B":
        return short(done, unit) if total is None else f"{short(done, unit)} of {short(total, unit)}"
    return f"{done:,} {unit}" if total is None else f"{done:,} of {total:,} {unit}"


def short(number: float, unit: str) -> str:
    """A number with two or three digits: 850 B, 1.2 GB, 4.2 M lines/s."""
    power = 0
    while number >= 999.5 and power < len(_PREFIXES) - 1:
        number /= 1000
        power += 1
    digits = 1 if power and number < 99.95 else 0
    space = "" if unit == "B" or not power else " "
    return f"{number:.{digits}f} {_PREFIXES[power]}{space}{unit}"
