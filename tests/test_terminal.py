"""Progress as it is shown: on a terminal, and in a log."""

import io
import re
import threading

import pytest
from rich.console import Console

from annatac_scale.progress import Silent, duration
from annatac_scale.progress_lines import PLAIN_LINE_EVERY_S, LineProgress
from annatac_scale.terminal import TerminalProgress

SAMPLES = {f"s{i}": 1_000_000 for i in range(200)}


class Clock:
    """A clock that stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Log:
    """What is written to a file that is no terminal."""

    def __init__(self, clock: Clock) -> None:
        self.file = io.StringIO()
        console = Console(file=self.file, highlight=False, soft_wrap=True, force_terminal=False)
        self.progress = TerminalProgress(console, clock)

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


@pytest.fixture
def log(clock: Clock) -> Log:
    return Log(clock)


def said_share(line: str) -> int:
    return int(re.search(r"(\d+)%", line)[1])  # type: ignore[index]


def test_lines_alone_tell_what_a_log_is_told(log: Log, clock: Clock) -> None:
    lines: list[str] = []
    alone = LineProgress(lines.append, clock)
    with alone.task("SVD", 100, "cells") as one, log.progress.task("SVD", 100, "cells") as other:
        for second in range(100):
            clock.now = 1000 + second
            one(1)
            other(1)
    alone.say("done")
    assert lines == [*log.lines, "done"]
    assert len(lines) == 4


def test_a_log_gets_a_line_at_most_every_half_minute(log: Log, clock: Clock) -> None:
    with log.progress.task("convert", 300, "B") as advance:
        for second in range(300):
            clock.now = 1000 + second
            advance(1)
    assert PLAIN_LINE_EVERY_S == 30
    assert [said_share(line) for line in log.lines] == [(30 * k + 1) * 100 // 300 for k in range(1, 10)]


def test_a_short_task_leaves_no_line_in_a_log(log: Log, clock: Clock) -> None:
    with log.progress.task("Training", 10, "steps") as advance:
        for _ in range(10):
            clock.now += 2
            advance(1)
    assert log.lines == []


def test_a_line_tells_share_samples_speed_and_the_time_that_is_left(log: Log, clock: Clock) -> None:
    with log.progress.task("convert", sum(SAMPLES.values()), "B", SAMPLES) as advance:
        for i in range(3):
            advance(1_000_000, 0, f"s{i}")
            advance.finished(f"s{i}")
        clock.now += 600
        advance(71_000_000, 2_520_000_000, "s3")
    assert log.lines[-1] == "convert: 37% · 3 of 200 samples · 4.2 M lines/s · about 17 min left"


def test_what_an_earlier_run_did_says_nothing_about_speed(log: Log, clock: Clock) -> None:
    with log.progress.task("convert", 1000, "B", {"a": 1000}) as advance:
        advance.found(900, "a")
        clock.now += 120
        advance(20, 1200, "a")
    # 20 in two minutes: the 80 that are left take eight, however much was there before.
    assert "92%" in log.lines[-1]
    assert "about 8 min left" in log.lines[-1]
    assert "10 lines/s" in log.lines[-1]


def test_nothing_is_promised_of_what_nothing_tells(log: Log, clock: Clock) -> None:
    with log.progress.task("convert", 100, "B") as found, log.progress.task("Reading", None, "cells") as read:
        found.found(50)
        clock.now += 100
        found(0)
        read(1234)
    assert log.lines == ["convert: 50% · 50 B of 100 B", "Reading: 1,234 cells"]


def test_a_finished_sample_gets_its_line_with_its_own_speed(log: Log, clock: Clock) -> None:
    with log.progress.task("convert", 300, "B", {"a": 100, "b": 100, "c": 100}) as advance:
        advance(50, 1000, "a")
        clock.now += 2
        advance(30, 4000, "b")
        clock.now += 2
        advance(50, 8000, "a")
        advance.finished("a")
        advance.finished("b")
        advance.finished("c")
    # a's second half, 8,000 lines, came 4 s after its first; of b only one range is known, of c nothing.
    assert log.lines == [
        "a: done, 1 of 3 · 9.0 k lines · 2.0 k lines/s",
        "b: done, 2 of 3 · 4.0 k lines",
        "c: done, 3 of 3",
    ]


def test_a_task_without_samples_says_how_much_is_done(log: Log, clock: Clock) -> None:
    with log.progress.task("Training", 324, "steps") as advance:
        clock.now += 60
        advance(120)
    assert log.lines == ["Training: 37% · 120 of 324 steps · about 2 min left"]


@pytest.mark.parametrize("total", [0, None])
def test_a_task_of_nothing_is_no_mistake(total: int | None, log: Log, clock: Clock) -> None:
    with log.progress.task("convert", total, "B", {}) as advance:
        clock.now += 60
        advance(0)
    assert len(log.lines) == 1


def test_all_is_counted_that_threads_report_at_once(log: Log, clock: Clock) -> None:
    with log.progress.task("convert", 8000, "B", {"a": 4000, "b": 4000}) as advance:

        def work(sample: str) -> None:
            for _ in range(1000):
                advance(1, 3, sample)

        threads = [threading.Thread(target=work, args=(name,)) for name in "aabb"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        advance.finished("a")
        clock.now += 31
        advance(0)
    assert log.lines[0].startswith("a: done, 1 of 2 · 6.0 k lines")
    assert log.lines[1].startswith("convert: 50% · 1 of 2 samples · 387 lines/s")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "about 5 s"), (42, "about 40 s"), (57, "about 55 s"), (58, "about 1 min"), (719, "about 12 min"),
        (5369, "about 89 min"), (5400, "about 1 h 30 min"), (7200, "about 2 h"), (12100, "about 3 h 20 min"),
        (172_000, "about 47 h 50 min"), (600_000, "about 7 days"),
    ],
)  # fmt: skip
def test_a_duration_is_no_finer_than_anybody_can_tell(seconds: float, said: str) -> None:
    assert duration(seconds) == said


class Screen:
    """A terminal, and what was drawn on it last."""

    def __init__(self, clock: Clock) -> None:
        self.file = io.StringIO()
        console = Console(
            file=self.file, force_terminal=True, width=110, height=40, highlight=False, soft_wrap=True,
            color_system=None, _environ={"TERM": "xterm"},
        )  # fmt: skip
        self.progress = TerminalProgress(console, clock)

    def drawn(self) -> str:
        with self.progress.console.capture() as capture:
            self.progress.console.print(self.progress._drawn())
        return capture.get()


@pytest.fixture
def screen(clock: Clock) -> Screen:
    return Screen(clock)


def test_a_terminal_shows_all_tasks_and_the_samples_at_work(screen: Screen, clock: Clock) -> None:
    samples = {f"[red]s{i}[/red]:smile:": 100 for i in range(9)}
    names = list(samples)
    with screen.progress.task("convert", 900, "B", samples) as advance:
        for name in names[:8]:
            advance(25, 100, name)
        clock.now += 10
        advance(25, 100, names[1])
        advance.finished(names[0])
        with screen.progress.task("Counting levels", 40, "cells") as other:
            other(10)
            drawn = screen.drawn()
        after = screen.drawn()
    assert "convert" in drawn
    assert "25% · 1 of 9 samples" in drawn
    assert re.search(r"\[red\]s1\[/red\]:smile: .* 50% · 10 lines/s", drawn)
    assert re.search(r"\[red\]s5\[/red\]:smile: .* 25%", drawn)
    assert names[0] not in drawn
    assert names[6] not in drawn
    assert "and 2 more" in drawn
    assert "10 of 40 cells" in drawn
    assert "Counting levels" not in after
    assert f"{names[0]}: done, 1 of 9" in screen.file.getvalue()


def test_a_terminal_is_left_clean_when_work_is_stopped(screen: Screen) -> None:
    before = set(threading.enumerate())

    def stop() -> None:
        with screen.progress.task("convert", 900, "B"), screen.progress.task("Reading", 9, "cells"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert screen.drawn().strip() == ""
    screen.progress.say("after")
    assert screen.file.getvalue().endswith("after\n")
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_a_dumb_terminal_gets_lines_as_a_log_does(clock: Clock) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, soft_wrap=True, _environ={"TERM": "dumb"})
    with TerminalProgress(console, clock).task("Training", 4, "steps") as advance:
        clock.now += 31
        advance(1)
    assert file.getvalue() == "Training: 25% · 1 of 4 steps · about 2 min left\n"


def test_silence_takes_all_that_is_reported() -> None:
    silent = Silent()
    silent.say("x")
    with silent.task("convert", 3, "B", {"a": 3}) as advance:
        advance(1)
        advance(1, 5, "a")
        advance.found(1, sample="a")
        advance.finished("a")
