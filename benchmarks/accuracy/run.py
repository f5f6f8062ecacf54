"""Accuracy on real labelled sets: this model and others on the same splits, and every experiment of PROTOCOL.md.

    python benchmarks/accuracy/run.py --data FOLDER --work FOLDER [--plan tiny] [--only TABLE ...] [--match TEXT]
    python benchmarks/accuracy/run.py --work FOLDER --set NAME=STORE:LABELS[:GROUP]      on a store of one's own
    python benchmarks/accuracy/run.py --data FOLDER --work FOLDER --quick

--data holds the labelled h5ad files; nothing is fetched. Every row is a process of its own on one core, and a JSON
file in WORK/rows named by the digest of its configuration: rows that are there are not run again, so that a run goes
on where it was stopped. A row that failed is a row too, with the reason; --again runs such ones again. A peer without
an environment (peers/make_env.sh) is such a row, and is tried again. Ends with one line of JSON; page.py --work FOLDER
then writes the page.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import experiments
import grid
import plans
from models import Clock, Models
from outside import CouldNotRunError
from rows import Rows
from runs import run
from sets import Stores
from table import method_lines

from annatac_scale.errors import AnnatacError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy.json"
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    stores = Stores(options.data.resolve(), options.work.resolve())
    peers = (options.peers or stores.work / "envs").resolve()
    if options.row:
        return _run_one(json.loads(options.row.read_text()), stores, peers)
    rows = Rows(stores.work / "rows")
    try:
        configs = [config for config in _configs(options) if options.match in _name(config)]
        waiting = [config for config in configs if _waits(config, rows, options.again)]
        stores.check(sorted(set().union(*(grid.sets_of(config) for config in waiting))))
    except (AnnatacError, ValueError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    _say_plan(configs, waiting, rows, options)
    if options.dry_run:
        return 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for config in waiting:
            pool.submit(_in_process, config, stores, rows, peers)
    failed = [config for config in configs if rows.failed(config)]
    if options.set:
        print(method_lines([rows.read(config) for config in configs]), flush=True)
    told = {
        "benchmark": "accuracy",
        "rows": len(configs),
        "ran": len(waiting),
        "failed": [_name(config) for config in failed if not _is_peer(config)],
        "could_not_run": [_name(config) for config in failed if _is_peer(config)],
    }
    print(json.dumps(told))
    return 1 if told["failed"] else 0


def _configs(options: argparse.Namespace) -> list[grid.Config]:
    """The rows that are asked for."""
    if options.quick:
        return grid.quick_configs() + plans.quick_configs()
    if options.set:
        return plans.own_configs(options.set)
    tables = options.only or (plans.TABLES if options.plan == "tiny" else (*plans.TABLES, *grid.TABLES))
    return [
        config
        for table in tables
        for config in (grid.configs(table) if table in grid.TABLES else plans.configs(table, options.plan))
    ]


def _waits(config: grid.Config, rows: Rows, again: bool) -> bool:
    """Whether a row is still to be run; what lacked an environment is tried again."""
    if not rows.has(config):
        return True
    failed = rows.read(config).get("failed", "")
    return bool(failed) and (again or failed.startswith("no environment"))


def _is_peer(config: grid.Config) -> bool:
    return config.get("params", {}).get("how") == "peer"


def _say_plan(
    configs: list[grid.Config], waiting: list[grid.Config], rows: Rows, options: argparse.Namespace
) -> None:
    """How many rows, and how long they will take by the times of those that were run."""
    saved = json.loads(RESULTS.read_text()) + rows.all()
    # Rows that follow from others took no time of their own.
    timed = [row for row in saved if "failed" not in row and "wall" in row.get("seconds", {})]
    seconds = plans.estimated(waiting, timed)
    hours = seconds / options.jobs / 3600
    print(
        f"{len(configs)} rows, {len(configs) - len(waiting)} there already; about {hours:.1f} hours for the others "
        f"with --jobs {options.jobs}",
        flush=True,
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the labelled h5ad files")
    parser.add_argument("--work", type=Path, required=True, help="folder of stores, models and rows; kept")
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments; WORK/envs")
    parser.add_argument("--plan", choices=plans.PLANS, default="whole", help="how much is run")
    parser.add_argument("--only", nargs="+", choices=(*plans.TABLES, *grid.TABLES), help="some of the tables")
    parser.add_argument("--match", default="", help="only rows whose name has this text in it")
    parser.add_argument(
        "--set", metavar="NAME=STORE:LABELS[:GROUP]", help="the methods on a store of one's own"
    )
    parser.add_argument("--quick", action="store_true", help="a few short rows of cerebellum, for tests")
    parser.add_argument("--jobs", type=int, default=1, help="rows that run at the same time")
    parser.add_argument("--again", action="store_true", help="run the rows that failed again")
    parser.add_argument("--dry-run", action="store_true", help="only say how many rows and how long")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _in_process(config: grid.Config, stores: Stores, rows: Rows, peers: Path) -> None:
    """Run a row in a process of its own, which writes it; write the reason where it did not."""
    task = rows.path(config).with_suffix(".task")
    task.parent.mkdir(parents=True, exist_ok=True)
    task.write_text(json.dumps(config))
    command = [
        sys.executable,
        __file__,
        "--data",
        str(stores.data),
        "--work",
        str(stores.work),
        "--peers",
        str(peers),
        "--row",
        str(task),
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    begin = time.perf_counter()
    done = subprocess.run(
        command,
        env={**os.environ, **ONE_CORE, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.perf_counter() - begin
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [""]
        rows.write(config, {}, {"wall": round(wall, 1)}, f"exit {done.returncode}: {lines[-1]}")
    task.unlink()
    row = rows.read(config)
    print(f"{wall:7.1f} s  {_name(config)}  {row.get('failed') or json.dumps(row['figures'])}", flush=True)


def _run_one(config: grid.Config, stores: Stores, peers: Path) -> int:
    clock, rows, failed = Clock(), Rows(stores.work / "rows"), ""
    begin = time.perf_counter()
    figures: dict[str, object] = {}
    try:
        if config["kind"] in experiments.KINDS:
            figures = experiments.run(config, experiments.Lab(Models(stores, clock), peers))
        else:
            figures = run(config, stores, clock)
    except CouldNotRunError as error:
        failed = str(error)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    if _is_peer(config):
        clock.seconds["peer"] = round(children.ru_utime + children.ru_stime, 2)
    rows.write(config, figures, {**clock.seconds, "wall": round(time.perf_counter() - begin, 1)}, failed)
    return 0


def _name(config: grid.Config) -> str:
    """What tells a row from the others of its table."""
    shown = ("table", "set", "select", "labels", "held", "attend", "model", "trained", "change", "seed")
    told = ("held", "trained", "change", "seed")
    named = [f"{key} {config[key]}" if key in told else str(config[key]) for key in shown if key in config]
    return ", ".join(named)


if __name__ == "__main__":
    sys.exit(main())
