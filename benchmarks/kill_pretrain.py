"""Kills workers and drivers of a pretraining on Ray with SIGKILL, and compares the model with an undisturbed one.

    python benchmarks/kill_pretrain.py [--quick] [--kills 10] [--steps 1200] [--seed 0] [--save]

Two CPU workers pretrain on the packaged cerebellum cells, keeping the state every few steps. Each kill comes a random
while after a checkpoint that is newer than the one before, and hits one of the workers, which Ray starts again, or the
driver, whose command is then given again. Compared are all files of the model folder, bit by bit. The logs of cells of
the attempts that the final weights come from are put together: each training cell has to come once in each epoch.
``recovery_s``: from a kill until the next attempt is about to take its first step. Ends with one line of JSON; exit 1
where the models differ or a cell came twice or not at all.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import anndata
import commands
import psutil

RESULTS = Path(__file__).with_name("results") / "kill_pretrain.json"
WORKERS = 2
EVERY_STEPS = 10
PATIENCE_S = 300.0
WORKER_NAME = "RayTrainWorker"
"""In the title that Ray gives to the process of a worker."""


@dataclass(frozen=True)
class Run:
    """A pretraining as a command, and the folder that it writes."""

    store: Path
    out: Path
    steps: int
    workers: str = str(WORKERS)

    @property
    def command(self) -> list[str]:
        settings = [f"train.min_steps={self.steps}", "train.patience=1000000", "reads=gate"]
        return [
            *commands.ANNATAC, "pretrain", str(self.store), "--out", str(self.out), "--preset", "tiny",
            *(part for setting in settings for part in ("--set", setting)),
            "--workers", self.workers, "--checkpoint-steps", str(EVERY_STEPS), "--log-cells", "--log-steps", "1",
        ]  # fmt: skip

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, in a group of its own; what it says is kept in a file beside its folder."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                self.command,
                cwd=commands.ROOT,
                env={**os.environ, **commands.ENVIRONMENT},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.out.with_suffix(".log").read_text()

    def newest_step(self) -> int:
        """The step of the newest checkpoint, -1 before there is one."""
        return max((int(path.stem[5:]) for path in self.out.glob("checkpoints/step-*.pt")), default=-1)

    def begins(self) -> list[int]:
        """The step that each attempt so far began at."""
        there = (self.out / "metrics.jsonl").exists()
        return [line["step"] for line in self.metrics() if "began" in line] if there else []

    def wait_for_checkpoint(self, attempt: int, process: subprocess.Popen[bytes]) -> None:
        """Wait for a checkpoint of an attempt, from 1. SystemExit where the run ends before, or none comes for long.

        One that is newer than the last kill may be of the attempt before: a worker that was left writes its last one.
        """
        until = time.monotonic() + PATIENCE_S
        while len(begins := self.begins()) < attempt or self.newest_step() <= begins[-1]:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"no checkpoint of attempt {attempt}: {self.said[-2000:]}")
            time.sleep(0.01)

    def model_files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.out / "model").iterdir())}

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def finish(run: Run, process: subprocess.Popen[bytes]) -> None:
    """Wait for the end. SystemExit where the command fails."""
    if process.wait(PATIENCE_S * 4):
        raise SystemExit(run.said[-2000:])


def kill_in(
    run: Run, process: subprocess.Popen[bytes], target: str, attempt: int, draw: random.Random, most_s: float
) -> float:
    """Kill a worker or the driver a while after the first checkpoint of an attempt; returns when, by the clock."""
    run.wait_for_checkpoint(attempt, process)
    time.sleep(draw.uniform(0, most_s))
    killed = psutil.Process(process.pid) if target == "driver" else draw.choice(workers_of(process))
    killed.send_signal(signal.SIGKILL)
    if target == "driver":
        process.wait()
    return time.time()


def workers_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of all training workers that a driver started; waits for them where it only just did.

    The workers of a driver that was killed live on for some seconds, and may write the checkpoint that was waited for.
    """
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and driver.poll() is None:
        below = psutil.Process(driver.pid).children(recursive=True)
        found = [child for child in below if WORKER_NAME in title_of(child)]
        if len(found) == WORKERS:
            return found
        time.sleep(0.05)
    raise SystemExit("found no training workers")


def title_of(process: psutil.Process) -> str:
    """What a process calls itself; "" where it ended meanwhile."""
    try:
        return "".join(process.cmdline())
    except psutil.Error:
        return ""


def disturbed(run: Run, targets: Sequence[str], draw: random.Random, most_s: float) -> list[dict[str, Any]]:
    """The run, killed and gone on with as often as there are targets, each within ``most_s`` after a checkpoint."""
    kills: list[dict[str, Any]] = []
    process = run.start()
    try:
        for attempt, target in enumerate(targets, 1):
            when = kill_in(run, process, target, attempt, draw, most_s)
            kills.append({"target": target, "step": run.newest_step(), "at": when})
            print(f"killed the {target} after step {kills[-1]['step']}", flush=True)
            if target == "driver":
                process = run.start()
        finish(run, process)
    finally:
        process.kill()  # where something failed: nothing may go on writing
        process.wait()
    return kills


def lineage(run: Run) -> Iterator[tuple[int, list[int]]]:
    """Epoch and cells of each step that the final weights come from."""
    import torch  # a second that bench_pretrain.py need not wait for

    last = max(run.out.glob("checkpoints/step-*.pt"))
    saved = torch.load(last, weights_only=True)
    ends = [first for _, first in saved["lineage"][1:]] + [saved["state"]["step"]]
    for (attempt, first), end in zip(saved["lineage"], ends, strict=True):
        steps: dict[int, tuple[int, list[int]]] = {}
        for path in sorted(run.out.glob(f"cells/attempt-{attempt:04d}-rank-*.jsonl")):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                steps.setdefault(record["step"], (record["epoch"], []))[1].extend(record["cells"])
        for step in range(first, end):
            yield steps[step]


def cells_wrong(run: Run, reference: Run) -> int:
    """Cells that came not once in an epoch of the lineage; the undisturbed run's first epoch tells which there are."""
    seen: dict[int, Counter[int]] = {}
    for epoch, cells in lineage(run):
        seen.setdefault(epoch, Counter()).update(cells)
    expected = {cell for epoch, cells in lineage(reference) if epoch == 0 for cell in cells}
    return sum(counts[cell] != 1 for counts in seen.values() for cell in expected | counts.keys())


def recoveries(run: Run, kills: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds from each kill to the start of the next attempt."""
    began = [line["time"] for line in run.metrics() if "began" in line]
    return [round(min(at for at in began if at >= kill["at"]) - kill["at"], 1) for kill in kills]


def write_quick_cells(shipped: Path, out: Path) -> Path:
    """The cells on one chromosome: steps are a tenth of the work."""
    cells = anndata.read_h5ad(shipped)
    cells[:, cells.var_names.str.startswith("chr1:")].copy().write_h5ad(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two kills, on one chromosome: for tests")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help=f"write the JSON into results/{RESULTS.name} too")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    # Few islands make fast steps: a kill has to come well before the last one.
    steps, most_s = (100, 0.5) if options.quick else (options.steps, 1.0)
    targets = ["worker", "driver"] if options.quick else draw.choices(["worker", "driver"], k=options.kills)
    with tempfile.TemporaryDirectory() as temporary:
        store = Path(temporary) / "cells.zarr"
        with as_file(files("annatac_scale") / "data" / "cerebellum.h5ad") as shipped:
            data = write_quick_cells(shipped, Path(temporary) / "cells.h5ad") if options.quick else shipped
            commands.printed([
                *commands.ANNATAC, "convert", str(data), "--assembly", "mm9", "--select", "all", "--out", str(store),
            ])  # fmt: skip
        whole, parts = (Run(store, Path(temporary) / name / "run", steps) for name in ("whole", "parts"))
        finish(whole, whole.start())
        kills = disturbed(parts, targets, draw, most_s)
        recovered = recoveries(parts, kills)
        report = {
            "benchmark": "kill_pretrain",
            "workers": WORKERS,
            "steps": steps,
            "kills": [{"target": kill["target"], "step": kill["step"]} for kill in kills],
            "attempts": sum("began" in line for line in parts.metrics()),
            "equal": parts.model_files() == whole.model_files(),
            "cells_wrong": cells_wrong(parts, whole),
            "recovery_s": {
                target: round(statistics.median(of), 1)
                for target in sorted(set(targets))
                if (of := [s for s, kill in zip(recovered, kills, strict=True) if kill["target"] == target])
            },
            **commands.conditions(),
        }
    report["failed"] = [] if report["equal"] and not report["cells_wrong"] else ["kill_pretrain"]
    commands.end(report, RESULTS if options.save else None)


if __name__ == "__main__":
    main()
