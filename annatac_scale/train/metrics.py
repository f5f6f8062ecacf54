"""What a run tells while it trains: lines of metrics.jsonl, TensorBoard's events, and a line for whoever watches."""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from annatac_scale.errors import StoreError
from annatac_scale.store.place import Location, is_url, place_of

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
UPLOAD_EVERY_S = 30.0
"""Object storage takes no lines one by one: it is given the whole log now and then."""


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
        self._place, self._say = place_of(location), say
        self._is_remote = is_url(location)
        size = self._place.size(METRICS)
        earlier = self._place.read(METRICS) if size else b""
        self.attempt = 1 + sum(b'"began"' in line for line in earlier.splitlines())
        self._scratch: Path | None = None
        self._folder = Path(location)
        if self._is_remote:
            self._folder = self._scratch = Path(tempfile.mkdtemp(prefix="annatac-metrics-"))
            (self._folder / METRICS).write_bytes(earlier)
        # The attempt before may have been killed within a line.
        self._before = "\n" if earlier and not earlier.endswith(b"\n") else ""
        self._events: EventsWriter | None = None
        self._works = True
        self._uploaded = -math.inf

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line. Its numbers besides step, epoch and attempt are scalars of TensorBoard."""
        if self._works:
            with self._telling():
                self._append({"attempt": self.attempt, **record, "time": round(time.time(), 2)})
                if self._is_remote and time.monotonic() - self._uploaded > UPLOAD_EVERY_S:
                    self._upload()

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

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        for path in sorted(self._folder.rglob("*")):
            if path.is_file():
                self._place.write(path.relative_to(self._folder).as_posix(), path.read_bytes())

    def close(self) -> None:
        """Bring object storage up to date. Raises nothing."""
        if self._is_remote and self._works:
            with self._telling():
                self._upload()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def shown(figures: Mapping[str, float]) -> str:
    """Figures on one line, without the score that only ranks validations."""
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "score")
