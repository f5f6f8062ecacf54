"""Kills conversions with SIGKILL at random moments, resumes them, and compares the stores with an undisturbed one.

    python benchmarks/kill_convert.py [--quick] [--kills 20] [--per-run 1] [--samples 1] [--workers 2] [--data FOLDER]

Every run starts an empty store, is killed ``--per-run`` times (the whole process group, at a moment drawn evenly from
the undisturbed run's time), and is then left to finish, always with the same command. Compared are the digests
(``annatac info STORE --digest``) and the files of the stores. ``redone``: CPU seconds of all attempts, each less a
start (the same command on a finished store), beyond those of the undisturbed run; its noise is that of two runs. Ends
with one line of JSON; exit 1 where a store differs.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import commands
import numpy as np
from fragments import FragmentSet, Spec, add_options, make, spec_of

RESULTS = Path(__file__).with_name("results") / "kill_convert.json"
MOST_DRAWS = 4  # for each run asked for: a run that ends before its kill counts as compared, not as killed


@dataclass(frozen=True)
class Attempt:
    """One process: how long it was let run, what it used, whether it was killed."""

    wall_s: float
    cpu_s: float
    killed: bool


def attempt(command: Sequence[str], after_s: float | None = None) -> Attempt:
    """Run to the end, or to a SIGKILL after some seconds. SystemExit where the command itself fails."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=commands.ROOT,
            env={**os.environ, **commands.ENVIRONMENT},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if after_s is not None:
            try:
                _sleep_while_running(process.pid, begin + after_s)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, -signal.SIGKILL):
            output.seek(0)
            raise SystemExit(output.read().decode(errors="replace"))
    killed = process.returncode != 0
    return Attempt(time.perf_counter() - begin, used.ru_utime + used.ru_stime, killed)


def _sleep_while_running(pid: int, until: float) -> None:
    """Sleep, but no longer than the process lives; it stays a zombie, so that its id is not given away."""
    while time.perf_counter() < until:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.005)


def files(store: Path) -> dict[str, int]:
    """Every file of a store with its size; metadata's sizes vary with times and paths and are left out."""
    return {
        str(path.relative_to(store)): -1 if path.suffix == ".json" else path.stat().st_size
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


def command_of(sets: Sequence[FragmentSet], out: Path, spec: Spec, workers: int, folder: Path) -> list[str]:
    if len(sets) == 1:
        return commands.convert(sets[0], out, spec.assembly, workers, qc=True)
    sheet = folder / "sheet.tsv"
    rows = (
        f"s{number}\t{made.fragments}\t{sets[0].peaks}\t{made.barcodes}\n" for number, made in enumerate(sets)
    )
    sheet.write_text("sample\tpath\tpeaks\tbarcodes\n" + "".join(rows))
    return commands.convert_sheet(sheet, out, spec.assembly, workers)


@dataclass(frozen=True)
class Undisturbed:
    """The store that every other must equal, and what it cost; start: the same command where nothing is left to do."""

    digest: str
    files: dict[str, int]
    whole: Attempt
    start: Attempt

    @classmethod
    def run(cls, command: Sequence[str], store: Path) -> "Undisturbed":
        attempt(command)
        shutil.rmtree(store)
        whole, start = attempt(command), attempt(command)
        return cls(commands.digest(store), files(store), whole, start)


def disturbed(
    command: Sequence[str], store: Path, moments: Sequence[float], model: Undisturbed
) -> dict[str, Any]:
    """One run killed at each of ``moments`` in turn, and resumed."""
    shutil.rmtree(store, ignore_errors=True)
    attempts = [attempt(command, moment) for moment in moments]
    attempts.append(attempt(command))
    worked = sum(max(0.0, one.cpu_s - model.start.cpu_s) for one in attempts)
    redone = worked - (model.whole.cpu_s - model.start.cpu_s)
    there = files(store)
    return {
        "killed_after_s": [round(one.wall_s, 2) for one in attempts if one.killed],
        "finished_before_the_kill": sum(not one.killed for one in attempts[:-1]),
        "resumed_cpu_s": round(attempts[-1].cpu_s, 2),
        "redone_cpu_s": round(redone, 2),
        "equal": commands.digest(store) == model.digest,
        "files_more_or_less": sorted(set(there.items()) ^ set(model.files.items()))[:10],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder that keeps what is generated; default: none is kept"
    )
    parser.add_argument("--kills", type=int, help="runs that are killed; default 20, quick: 2")
    parser.add_argument("--per-run", type=int, default=1, help="kills of a run; default 1")
    parser.add_argument(
        "--samples", type=int, default=1, help="in a sheet, each with --lines lines; default 1"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULTS.name}")
    add_options(parser)
    options = parser.parse_args()
    options.kills = options.kills or (2 if options.quick else 20)
    return options


def run(options: argparse.Namespace, spec: Spec, folder: Path) -> tuple[Undisturbed, list[dict[str, Any]]]:
    """The undisturbed run and all the killed ones."""
    kept = options.data or folder
    specs = [replace(spec, seed=spec.seed + number) for number in range(options.samples)]
    sets = [make(kept / one.folder(), one) for one in specs]
    store = folder / "store"
    command = command_of(sets, store, spec, options.workers, folder)
    model = Undisturbed.run(command, store)
    whole, start = model.whole, model.start
    print(
        f"undisturbed: wall {whole.wall_s:.1f} s, CPU {whole.cpu_s:.1f} s, {start.cpu_s:.1f} of it to start"
    )
    rng = np.random.default_rng(spec.seed)
    runs: list[dict[str, Any]] = []
    for _ in range(MOST_DRAWS * options.kills):
        moments = (rng.random(options.per_run) * whole.wall_s).tolist()
        runs.append(disturbed(command, store, moments, model))
        print(f"run {len(runs)}: {runs[-1]}", flush=True)
        if sum(bool(one["killed_after_s"]) for one in runs) == options.kills:
            break
    return model, runs


def main() -> None:
    options = arguments()
    spec = spec_of(options)
    with tempfile.TemporaryDirectory(dir=options.data) as temporary:
        model, runs = run(options, spec, Path(temporary))
    redone = [one["redone_cpu_s"] for one in runs]
    report = {
        "benchmark": "kill_convert",
        "lines": spec.lines,
        "samples": options.samples,
        "workers": options.workers,
        "runs": len(runs),
        "killed_runs": sum(bool(one["killed_after_s"]) for one in runs),
        "kills": sum(len(one["killed_after_s"]) for one in runs),
        "equal": sum(one["equal"] for one in runs),
        "same_files": sum(not one["files_more_or_less"] for one in runs),
        "undisturbed_cpu_s": round(model.whole.cpu_s, 2),
        "start_cpu_s": round(model.start.cpu_s, 2),
        "redone_cpu_s_median": round(statistics.median(redone), 2),
        "redone_cpu_s_max": max(redone),
        **commands.conditions(),
    }
    if options.save:
        RESULTS.write_text(json.dumps({**report, "each": runs}, indent=1) + "\n")
    print(json.dumps(report))
    raise SystemExit(0 if report["equal"] == len(runs) else 1)


if __name__ == "__main__":
    main()
