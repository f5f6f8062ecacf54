"""Pretraining as a user starts it: speed by workers, time that is not computing, memory, checkpoints, a million cells.

    python benchmarks/bench_pretrain.py [--quick] [--cases workers,checkpoints,big] [--rounds 3] [--data FOLDER]

Every run is ``annatac pretrain`` in processes of its own, one thread each (big: all), on a generated store of the
paper's islands and depth, asked to end by SIGTERM after some steps; figures are those of its metrics.jsonl, the first
lines left out.

- workers: preset small, in this process and with 1 and 2 workers on Ray, taking turns. ``not_computing``: share of the
  time outside of forward, backward, exchange and optimizer; ``ray_overhead``: time of a step with one worker over the
  plain loop's, less 1, after the start.
- checkpoints: the plain loop with and without a checkpoint every few steps. ``checkpoint_s``: what one takes from
  training, its share of 10 minutes, and its bytes.
- big: 1,011,883 cells beside 100,000, ten times the steps: memory by step, cells/s, the time to the first step, and
  by these the whole run.

--save writes results/pretrain.json; of cases that were not run, those saved there stay. Ends with one line of JSON.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import commands
import psutil
from bench_stream import cpu_model
from kill_pretrain import WORKER_NAME, title_of
from store_writer import STORE, Spec, make_store
from turns import spread

RESULTS = Path(__file__).with_name("results") / "pretrain.json"
PAPER_CELLS, FEWER_CELLS, FEW_CELLS = 1_011_883, 100_000, 20_000
BARS = {"not_computing": 0.05, "checkpoint_share": 0.01, "ray_overhead": 0.03}
MINUTES = 10.0
PATIENCE_S = 3_600.0
LOOK_EVERY_S = 0.25
BATCH, EVERY, LONGER = 64, 5, 10


@dataclass(frozen=True)
class Bench:
    """Where stores are kept, and how long runs are. steps: of a run; skip: first ones that are not measured"""

    data: Path
    scratch: Path
    rounds: int
    quick: bool
    preset: str
    steps: int
    skip: int

    @property
    def n_quick(self) -> int:
        return 2_000

    def store(self, cells: int) -> Path:
        spec = replace(Spec.quick() if self.quick else Spec(), cells=cells)
        folder = self.data / spec.folder()
        make_store(folder, spec)
        return folder / STORE

    def run(
        self, name: str, store: Path, *options: str, steps: int | None = None, threads: int = 1
    ) -> dict[str, Any]:
        """Pretrain for some steps; figures of the steps after the first ones."""
        out = self.scratch / name
        command = [
            *commands.ANNATAC, "pretrain", str(store), "--out", str(out), "--preset", self.preset,
            "--log-steps", "1", "--set", "train.warmup_steps=0", *options,
        ]  # fmt: skip
        steps = steps or self.steps
        begin = time.time()
        with (self.scratch / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=commands.ROOT,
                env={**os.environ, **commands.ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
                stdout=log,
                stderr=log,
            )
        memory = Memory(process.pid)
        memory.start()
        try:
            wait_for_steps(out / "metrics.jsonl", steps, process)
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            memory.end()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        taken = [line for line in lines if "rate" in line][:steps]
        measured = taken[self.skip :]
        seconds = measured[-1]["time"] - taken[self.skip - 1]["time"]
        cells = BATCH * len(measured)
        found = {
            "cells_per_s": round(cells / seconds, 1),
            "step_ms": round(seconds / len(measured) * 1e3, 2),
            "waiting_share": round(statistics.mean(line["waiting_share"] for line in measured), 4),
            "not_computing": round(1 - statistics.mean(line["computing_share"] for line in measured), 4),
            "rss_mb": memory.largest(measured[0]["time"], measured[-1]["time"]),
            "rss_growth_mb": memory.growth(measured[0]["time"], measured[-1]["time"]),
            "first_step_after_s": round(taken[0]["time"] - begin, 1),
            "checkpoint_mb": round(
                max(path.stat().st_size for path in (out / "checkpoints").glob("step-*.pt")) / 1e6, 1
            ),
        }
        print(f"{name:24} {found}", flush=True)
        return found


class Memory(threading.Thread):
    """Looks every now and then at the resident memory of the largest process that trains, of all below a process."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._done = threading.Event()
        self._seen: list[tuple[float, float]] = []

    def run(self) -> None:
        while not self._done.wait(LOOK_EVERY_S):
            sizes = []
            try:
                top = psutil.Process(self._pid)
                below = top.children(recursive=True)
            except psutil.NoSuchProcess:
                return
            workers = [one for one in below if WORKER_NAME in title_of(one)]
            for one in workers or [top]:
                try:
                    sizes.append(one.memory_info().rss / 1e6)
                except psutil.NoSuchProcess:
                    continue
            if sizes:
                self._seen.append((time.time(), max(sizes)))

    def end(self) -> None:
        self._done.set()
        self.join()

    def largest(self, begin: float, end: float) -> float:
        return round(max((size for at, size in self._seen if begin <= at <= end), default=0.0))

    def growth(self, begin: float, end: float) -> float:
        """Median of the last quarter of the time less that of the second quarter."""
        quarter = (end - begin) / 4
        early = [size for at, size in self._seen if begin + quarter <= at <= begin + 2 * quarter]
        late = [size for at, size in self._seen if end - quarter <= at <= end]
        return round(statistics.median(late) - statistics.median(early), 1) if early and late else 0.0


def wait_for_steps(metrics: Path, steps: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until that many steps are logged. SystemExit where the run ends before."""
    until = time.monotonic() + PATIENCE_S
    while not metrics.exists() or sum('"rate"' in line for line in metrics.open()) < steps:
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"{metrics.parent}: ended, or was too slow, before {steps} steps")
        time.sleep(0.2)


def summed(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread of each figure."""
    return {name: spread(one[name] for one in rounds) for name in rounds[0]}


def case_workers(bench: Bench) -> dict[str, Any]:
    store = bench.store(FEW_CELLS if not bench.quick else bench.n_quick)
    runs: dict[str, tuple[str, ...]] = {"plain": (), "ray_1": ("--workers", "1"), "ray_2": ("--workers", "2")}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for number in range(bench.rounds):
        for name, options in runs.items():
            found[name].append(bench.run(f"{name}-{number}", store, *options))
    overheads = [
        ray["step_ms"] / plain["step_ms"] - 1
        for ray, plain in zip(found["ray_1"], found["plain"], strict=True)
    ]
    faster = [
        two["cells_per_s"] / one["cells_per_s"]
        for two, one in zip(found["ray_2"], found["ray_1"], strict=True)
    ]
    return {
        "runs": {name: summed(of) for name, of in found.items()},
        "ray_overhead": spread(overheads),
        "two_workers_over_one": spread(faster),
    }


def case_checkpoints(bench: Bench) -> dict[str, Any]:
    store = bench.store(FEW_CELLS if not bench.quick else bench.n_quick)
    costs, sizes = [], []
    for number in range(bench.rounds):
        without = bench.run(f"none-{number}", store, "--checkpoint-minutes", "999")
        every = bench.run(f"every-{number}", store, "--checkpoint-steps", str(EVERY))
        costs.append((every["step_ms"] - without["step_ms"]) * EVERY / 1e3)
        sizes.append(every["checkpoint_mb"])
    cost = spread(costs)
    return {
        "runs": {},
        "every_steps": EVERY,
        "checkpoint_s": cost,
        "checkpoint_mb": sizes[0],
        "share_of_10_minutes": round(cost["median"] / (60 * MINUTES), 5),
    }


def case_big(bench: Bench) -> dict[str, Any]:
    sizes = (FEWER_CELLS, PAPER_CELLS) if not bench.quick else (bench.n_quick, 2 * bench.n_quick)
    steps, threads = LONGER * bench.steps, len(os.sched_getaffinity(0))
    runs = {
        f"cells_{cells}": bench.run(f"cells-{cells}", bench.store(cells), steps=steps, threads=threads)
        for cells in sizes
    }
    fewer, more = runs.values()
    epoch_h = sizes[1] / more["cells_per_s"] / 3600
    return {
        "runs": runs,
        "steps": steps,
        "threads": threads,
        "speed_over_fewer_cells": round(more["cells_per_s"] / fewer["cells_per_s"], 3),
        "hours_an_epoch": round(epoch_h, 2),
        "hours_of_10_epochs": round(10 * epoch_h + more["first_step_after_s"] / 3600, 1),
    }


CASES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "workers": case_workers,
    "checkpoints": case_checkpoints,
    "big": case_big,
}


def bars(cases: dict[str, Any]) -> dict[str, Any]:
    """What was found beside what was aimed at."""
    found = {}
    if "workers" in cases:
        found["not_computing"] = cases["workers"]["runs"]["plain"]["not_computing"]["median"]
        found["ray_overhead"] = cases["workers"]["ray_overhead"]["median"]
    if "checkpoints" in cases:
        found["checkpoint_share"] = cases["checkpoints"]["share_of_10_minutes"]
    return {
        name: {"found": value, "bar": f"<= {BARS[name]}", "met": value <= BARS[name]}
        for name, value in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder that keeps the stores; default: none is kept")
    commands.add_cases(parser, CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15, help="of each run")
    parser.add_argument(
        "--quick", action="store_true", help="preset tiny on a few cells, one round: for tests"
    )
    parser.add_argument("--save", action="store_true", help=f"write the JSON into results/{RESULTS.name} too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(
            (options.data or Path(temporary) / "data").resolve(),
            Path(temporary),
            1 if options.quick else options.rounds,
            options.quick,
            "tiny" if options.quick else "small",
            12 if options.quick else options.steps,
            2 if options.quick else 5,
        )
        bench.data.mkdir(parents=True, exist_ok=True)
        saved = json.loads(RESULTS.read_text())["cases"] if options.save and RESULTS.exists() else {}
        cases = saved | {name: CASES[name](bench) for name in options.cases}
    report = {
        "benchmark": "pretrain",
        "preset": bench.preset,
        "batch": BATCH,
        "steps": bench.steps,
        "rounds": bench.rounds,
        "cases": cases,
        "bars": {} if bench.quick else bars(cases),
        "failed": [],
        "cpu": cpu_model(),
        **commands.conditions(),
    }
    commands.end(report, RESULTS if options.save else None)


if __name__ == "__main__":
    main()
