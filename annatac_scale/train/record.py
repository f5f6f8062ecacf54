"""What rank 0 keeps of a run while it trains, and tells of it; the other ranks keep nothing."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from annatac_scale.errors import ConfigError
from annatac_scale.progress import Progress, duration
from annatac_scale.store.files import as_store_error
from annatac_scale.store.place import Location
from annatac_scale.store.store import IslandStore
from annatac_scale.train.checkpoint import CHECKPOINTS, Checkpoints
from annatac_scale.train.metrics import Meter, MetricsLog, StepFacts, shown
from annatac_scale.train.ranks import Ranks
from annatac_scale.train.run_folder import RunFolder
from annatac_scale.train.run_options import RunOptions

SAY_EVERY_S = 30.0
"""Seconds between two lines for whoever watches."""
_MOST_NAMED = 5


class Record:
    """The record of one attempt at a run. Ranks other than 0 may call all of it, and write nothing but their cells.

    store: names the cells of a batch
    lineage: [attempt, first step] of the attempts that the weights come from, this one last
    """

    def __init__(
        self, run: RunFolder, store: IslandStore, options: RunOptions, ranks: Ranks, progress: Progress
    ) -> None:
        self.location: Location = run.location
        self.skips = options.on_nan == "skip"
        self.lineage: list[list[int]] = []
        self._options, self._store, self._ranks, self._progress = options, store, ranks, progress
        self._attempt = 0
        self._window, self._said = Meter(), (time.monotonic(), 0)
        self._checkpoints: Checkpoints | None = None
        self._metrics: MetricsLog | None = None
        self._saved_at = time.monotonic()
        if ranks.rank == 0:
            self._checkpoints = Checkpoints(run.place.below(CHECKPOINTS), options.keep, progress.say)

    @classmethod
    @contextmanager
    def of(
        cls, run: RunFolder, store: IslandStore, options: RunOptions, ranks: Ranks, progress: Progress
    ) -> Iterator["Record"]:
        """The record, closed with the context. Raises ConfigError where cells are to be logged out of reach."""
        if options.log_cells and not isinstance(run.location, Path):
            raise ConfigError(
                f"--log-cells: found --out {run.location}, expected a folder on a disk: lines are added step by step"
            )
        record = cls(run, store, options, ranks, progress)
        with _deterministic(options.deterministic):
            try:
                yield record
            finally:
                record._close()

    def newest(self) -> bytes | None:
        """The newest whole checkpoint; None where there is none, and on other ranks."""
        return None if self._checkpoints is None else self._checkpoints.newest()

    def began(self, step: int, world_size: int, lineage: Sequence[Sequence[int]]) -> None:
        """Note that an attempt began after ``step``, from weights of this lineage."""
        if self._checkpoints is not None:
            self._metrics = MetricsLog(self.location, self._progress.say)
            self._attempt = self._metrics.attempt
            self._metrics.write({"step": step, "world_size": world_size, "began": True})
        self._attempt = int(self._ranks.sum([float(self._attempt)])[0])
        self._window, self._said = Meter(), (time.monotonic(), step)
        self.lineage = [[attempt, first] for attempt, first in lineage if first < step]
        self.lineage.append([self._attempt, step])

    def cells(self, step: int, epoch: int, cell_ids: NDArray[np.int64]) -> None:
        """Note the cells of this rank in the step that comes next, where that was asked for.

        Raises StoreError where they cannot be written: a log with gaps proves nothing.
        """
        if not self._options.log_cells:
            return
        folder = Path(self.location) / "cells"
        path = folder / f"attempt-{self._attempt:04d}-rank-{self._ranks.rank:04d}.jsonl"
        try:
            folder.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps({"step": step, "epoch": epoch, "cells": cell_ids.tolist()}) + "\n")
        except OSError as error:
            raise as_store_error(error, path, "written") from error

    def step(self, facts: StepFacts, step: int, n_steps: int, epoch: int) -> None:
        """Take in a step; log and say it when it is time.

        step: how many there were, of ``n_steps``; epoch: counted from 1, as validations do
        """
        if self._metrics is None:
            return
        self._window.add(facts)
        if step % self._options.log_steps == 0:
            figures = self._window.figures()
            self._metrics.write({"step": step, "epoch": epoch, "rate": facts.rate, **figures})
            self._window = Meter()
            self._say(step, n_steps, epoch, facts.rate, figures)

    def _say(self, step: int, n_steps: int, epoch: int, rate: float, figures: Mapping[str, float]) -> None:
        since, at = self._said
        seconds = time.monotonic() - since
        if seconds < SAY_EVERY_S:
            return
        left = duration(seconds / (step - at) * (n_steps - step))
        self._progress.say(
            f"step {step:,} of {n_steps:,}, epoch {epoch}: {shown(figures)}  rate {rate:.3g}  {left} left"
        )
        self._said = time.monotonic(), step

    def validated(self, step: int, epoch: int, figures: Mapping[str, float]) -> None:
        """Log a validation."""
        if self._metrics is not None:
            named = {f"validation_{name}": value for name, value in figures.items()}
            self._metrics.write({"step": step, "epoch": epoch, **named})
            self._window = Meter()  # validating is no part of a step

    def is_due(self, step: int) -> bool:
        """Whether the state after a step should be kept now."""
        if self._checkpoints is None:
            return False
        every, minutes = self._options.checkpoint_steps, (time.monotonic() - self._saved_at) / 60
        by_time = minutes >= self._options.checkpoint_minutes and not self._checkpoints.is_writing
        return by_time or bool(every and step % every == 0)

    def save(self, step: int, state: Mapping[str, Any], bests: Sequence[int], needed: bool = False) -> None:
        """Keep the state, as ``Checkpoints.save``."""
        if self._checkpoints is not None:
            self._checkpoints.save(step, state, bests, needed)
            self._saved_at = time.monotonic()

    def settle(self) -> None:
        """Wait until what was saved is written, as ``Checkpoints.settle``."""
        if self._checkpoints is not None:
            self._checkpoints.settle()

    def read(self, step: int) -> bytes | None:
        """A checkpoint; None on other ranks."""
        return None if self._checkpoints is None else self._checkpoints.read(step)

    def has_whole(self, step: int) -> bool:
        """Whether the checkpoint after a step is whole; False on other ranks."""
        return self._checkpoints is not None and self._checkpoints.has_whole(step)

    def names_of(self, cells: Sequence[int]) -> str:
        """Cells by sample and barcode."""
        named = [f"cell {cell}: {self._store.name_of(cell)}" for cell in cells[:_MOST_NAMED]]
        more = [f"and {len(cells) - _MOST_NAMED} more"] if len(cells) > _MOST_NAMED else []
        return ", ".join([*named, *more])

    def _close(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.close()
        if self._metrics is not None:
            self._metrics.close()


@contextmanager
def _deterministic(asked: bool) -> Iterator[None]:
    """GPU kernels that repeat their bits, for the time of the context."""
    before = torch.are_deterministic_algorithms_enabled()
    if asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses to go on without
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
