"""Processes that take turns, and what their rounds say together: medians, spreads and ratios of each round."""

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import commands
import forked
from measure import measured
from peers import Peer

HERE = Path(__file__).parent
LIMIT_S = 3_600


@dataclass(frozen=True)
class Run:
    """A process of a case.

    space_kb: its ``ulimit -v``, None for none; script: what it runs, if no peer
    fork: the run is a fork of a process that has imported the script, and these modules; None: it is a process from
        its start. Quick benchmarks fork; neither a peer nor with ``space_kb``
    """

    name: str
    task: Mapping[str, Any]
    peer: Peer | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    space_kb: int | None = None
    script: str = "stream_work.py"
    fork: Sequence[str] | None = None

    def measured(self, scratch: Path) -> dict[str, Any]:
        """Figures of the process, and those that it printed."""
        task = scratch / f"{self.name}.json"
        task.write_text(json.dumps(self.task))
        figures = self._started(task) if self.fork is None else self._forked(task, self.fork)
        printed = figures.pop("printed")
        if "failed" not in figures:
            figures.update(_per_cell(json.loads(printed)))
        print(_line(self.name, figures), flush=True)
        return figures

    def _forked(self, task: Path, modules: Sequence[str]) -> dict[str, Any]:
        assert self.peer is None
        assert self.space_kb is None
        return forked.measured(HERE / self.script, task, self.env, modules)

    def _started(self, task: Path) -> dict[str, Any]:
        script = HERE / ("peer_stream.py" if self.peer else self.script)
        command = [str(self.peer.python if self.peer else sys.executable), str(script), str(task)]
        if self.space_kb is not None:
            command = ["bash", "-c", 'ulimit -v "$0" && exec "$@"', str(self.space_kb), *command]
        path = self.peer.path if self.peer else str(commands.ROOT)
        env = {**commands.ENVIRONMENT, "PYTHONPATH": path, **self.env}
        return measured(command, commands.ROOT, env, LIMIT_S)


def _per_cell(printed: dict[str, Any]) -> dict[str, Any]:
    """What was printed, with figures by cell where epochs were measured."""
    if not printed.get("epochs_cpu_s"):
        return printed
    cells = printed["cells"]
    found = {
        "cpu_us_per_cell": round(printed["epochs_cpu_s"] / cells * 1e6, 3),
        "cells_per_cpu_s": round(cells / printed["epochs_cpu_s"]),
        "cells_per_s": round(cells / printed["epochs_wall_s"]),
    }
    if "x_bytes" in printed:
        found["x_bytes_per_cell"] = round(printed["x_bytes"] / cells * printed["epochs"], 1)
    return {**printed, **found}


def _line(name: str, figures: Mapping[str, Any]) -> str:
    if "failed" in figures:
        return f"{name:28} {figures['failed']}"
    text = f"{name:28} peak {figures['rss_mb']:6.0f} MB   load {figures['load']:4.1f}"
    if "cpu_us_per_cell" in figures:
        text += f"   CPU {figures['cpu_us_per_cell']:6.2f} us a cell   {figures['cells_per_s']:9,} cells/s"
    if "cpu_ms_per_cell" in figures:
        text += f"   CPU {figures['cpu_ms_per_cell']:9.3f} ms a cell   {figures['cells_per_s']:9,.1f} cells/s"
    return text


Rounds = dict[str, list[dict[str, Any]]]
"""Figures of each round of each run."""


def take_turns(runs: Sequence[Run], rounds: int, scratch: Path) -> Rounds:
    """One run after the other, round after round; one that failed does not run again."""
    found: Rounds = {run.name: [] for run in runs}
    for _ in range(rounds):
        for run in runs:
            if not any("failed" in figures for figures in found[run.name]):
                found[run.name].append(run.measured(scratch))
    return found


def warm(path: Path) -> None:
    """Read all files, so that they are in the page cache."""
    for name in [path] if path.is_file() else sorted(path.rglob("*")):
        if name.is_file():
            with name.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    values = list(values)
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


SPREAD = (
    "cpu_us_per_cell",
    "cpu_ms_per_cell",
    "cells_per_cpu_s",
    "cells_per_s",
    "first_batch_s",
    "first_batch_cpu_s",
    "link_share",
    "first_call_cpu_s",
    "zero_ms",
    "gradient_ms",
    "clip_ms",
    "adamw_ms",
)
LARGEST = ("rss_mb", "vm_peak_mb", "peak_mb_per_cell", "load")
LAST = ("x_bytes_per_cell", "open_s", "ids", "cells", "open_per_cell", "table_mb", "micro_steps", "device")


def summary(rounds_of: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median and spread over the rounds, or why there are none."""
    last = rounds_of[-1]
    if "failed" in last:
        return {"failed": last["failed"]}
    found: dict[str, Any] = {"rounds": len(rounds_of)}
    found.update({name: spread(one[name] for one in rounds_of) for name in SPREAD if name in last})
    found.update({name: max(one[name] for one in rounds_of) for name in LARGEST if last.get(name)})
    found.update({name: last[name] for name in LAST if name in last})
    return found


def summaries(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    return {name: summary(rounds_of) for name, rounds_of in found.items()}


def largest(
    found: Mapping[str, Sequence[Mapping[str, Any]]], what: str, names: Iterable[str]
) -> float | None:
    """The largest figure of all rounds of some runs; None where one of them failed."""
    rounds_of = [one for name in names for one in found[name]]
    if any("failed" in figures for figures in rounds_of):
        return None
    return max(figures[what] for figures in rounds_of)


def ratio(
    found: Mapping[str, Sequence[Mapping[str, Any]]], over: str, under: str, what: str = "cells_per_cpu_s"
) -> dict[str, float] | None:
    """``over`` / ``under`` of a figure, round by round; None where one of both did not run."""
    both = [found.get(name, []) for name in (over, under)]
    if not all(both) or any("failed" in figures for rounds_of in both for figures in rounds_of):
        return None
    return spread(one[what] / other[what] for one, other in zip(*both, strict=False))
