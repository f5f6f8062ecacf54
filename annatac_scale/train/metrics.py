"""What a run tells while it trains: lines of metrics.jsonl, TensorBoard's events, and a line for whoever watches."""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from annatac_scale.errors import StoreError
from annatac_scale.store.place import Location, Place, is_url, place_of

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
UPLOAD_EVERY_S = 30.0
UPLOAD_BYTES_PER_S = 1e6
"""Object storage takes no lines one by one: it is given the whole log now and then, a long one less often."""


@dataclass(frozen=True)
class LossTotal:
    """A loss over the global batches of some steps, not yet divided by the targets."""

    sum: float = 0.0
    count: float = 0.0
    correct: float = 0.0

    def __add__(self, other: "LossTotal") -> "LossTotal":
        return LossTotal(self.sum + other.sum, self.count + other.count, self.correct + other.correct)


@dataclass(frozen=True)
class StepFacts:
    """What one step was. losses and n_cells: of the global batch, losses empty where the step was left out

    rate: learning rate; waited_s: seconds in which this rank stood still for its batch; computed_s: seconds of forward,
    backward with the exchange of gradients, and optimizer
    """

    losses: Mapping[str, LossTotal]
    n_cells: int
    rate: float
    waited_s: float
    computed_s: float


class Meter:
    """Means over some steps: losses, accuracies, speed, and the shares of time that waiting and computing took."""

    def __init__(self) -> None:
        self._totals: dict[str, LossTotal] = {}
        self._cells = self._skipped = 0
        self._waited = self._computed = 0.0
        self._start = time.monotonic()

    def add(self, step: StepFacts) -> None:
        """Take in a step."""
        for name, loss in step.losses.items():
            self._totals[name] = self._totals.get(name, LossTotal()) + loss
        self._cells += step.n_cells
        self._skipped += not step.losses
        self._waited += step.waited_s
        self._computed += step.computed_s

    def figures(self) -> dict[str, float]:
        """Figures by name."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        figures = {
            "cells_per_s": round(self._cells / seconds, 1),
            "waiting_share": round(self._waited / seconds, 4),
            "computing_share": round(self._computed / seconds, 4),
        }
        if self._skipped:
            figures["skipped_steps"] = self._skipped
        for name, loss in self._totals.items():
            figures[f"{name}_loss"] = loss.sum / max(loss.count, 1.0)
            figures[f"{name}_accuracy"] = loss.correct / max(loss.count, 1.0)
        return figures


class MetricsLog:
    """Appends to metrics.jsonl and to TensorBoard's events, for the one process that writes a run's folder.

    Lines of steps that an interrupted attempt took and the next one took again stay: each line names its attempt, which
    is one more than there were before. What cannot be written is told of once, and no run ends for it.
    """

    def __init__(self, location: Location, say: Callable[[str], None]) -> None:
        self._say, place = say, place_of(location)
        earlier = place.read(METRICS) if place.size(METRICS) else b""
        self.attempt = 1 + sum(b'"began"' in line for line in earlier.splitlines())
        self._folder = Path(location)
        self._mirror: _Mirror | None = None
        if is_url(location):
            self._folder = Path(tempfile.mkdtemp(prefix="annatac-metrics-"))
            (self._folder / METRICS).write_bytes(earlier)
            self._mirror = _Mirror(self._folder, place)
        # The attempt before may have been killed within a line.
        self._before = "\n" if earlier and not earlier.endswith(b"\n") else ""
        self._events: EventsWriter | None = None
        self._works = True

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line. Its numbers besides step, epoch and attempt are scalars of TensorBoard."""
        if self._works:
            with self._telling():
                self._append({"attempt": self.attempt, **record, "time": round(time.time(), 2)})
                if self._mirror is not None:
                    self._mirror.copy()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (OSError, StoreError) as error:
            self._works = False
            self._say(f"metrics are not written any more, training goes on: {' '.join(str(error).split())}")

    def _append(self, record: Mapping[str, Any]) -> None:
        with (self._folder / METRICS).open("a") as file:
            file.write(f"{self._before}{json.dumps(record)}\n")
        self._before = ""
        scalars = [
            (name, float(value))
            for name, value in record.items()
            if name not in ("attempt", "step", "time") and isinstance(value, int | float)
        ]
        if self._events is None:
            # Not through a SummaryWriter, whose thread may die of a full disk, and then lets its callers wait for ever.
            folder = self._folder / TENSORBOARD
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{self.attempt}")
        for name, value in scalars:
            summary = scalar(name, value)
            event = Event(step=record["step"], wall_time=record["time"], summary=summary)
            self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        """Bring object storage up to date. Raises nothing."""
        if self._mirror is not None:
            with self._telling():
                self._mirror.close(copy=self._works)
            shutil.rmtree(self._folder, ignore_errors=True)


class _Mirror:
    """Copies the files of a growing folder into object storage, in a thread: training does not wait for it.

    A copy that is made while a line is added may end within that line; the next one has all of it.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        self._folder, self._place = folder, place
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._copying: Future[int] | None = None
        self._next = -math.inf

    def copy(self) -> None:
        """Begin a copy, unless it is too early for the next one. Raises StoreError where the one before failed."""
        if self._copying is not None:
            if not self._copying.done():
                return
            seconds = self._copying.result() / UPLOAD_BYTES_PER_S
            self._copying, self._next = None, time.monotonic() + UPLOAD_EVERY_S + seconds
        if time.monotonic() >= self._next:
            self._copying = self._thread.submit(self._copy)

    def _copy(self) -> int:
        """The bytes that were copied."""
        n_bytes = 0
        for path in sorted(path for path in self._folder.rglob("*") if path.is_file()):
            data = path.read_bytes()
            self._place.write(path.relative_to(self._folder).as_posix(), data)
            n_bytes += len(data)
        return n_bytes

    def close(self, copy: bool) -> None:
        """End the thread. copy: all there is, before; raises StoreError where that fails."""
        with self._thread:
            if copy:
                self._thread.submit(self._copy).result()


def shown(figures: Mapping[str, float]) -> str:
    """Figures on one line, without the score that only ranks validations."""
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "score")
