"""Accuracy on real labelled sets: linear bars, models with and without encoder and pretraining, few labels.

    python benchmarks/accuracy/run.py --data FOLDER --work FOLDER [--only TABLE ...] [--match TEXT] [--quick]

--data holds the labelled h5ad files; nothing is fetched. Every row is a process of its own on one core, and a JSON
file in WORK/rows named by the digest of its configuration: rows that are there are not run again. A row that failed
is a row too, with the reason; --again runs such ones again. Ends with one line of JSON; page.py --work FOLDER then
writes the page.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grid
from models import Clock
from rows import Rows
from runs import run
from sets import Stores

from annatac_scale.errors import AnnatacError

ROOT = Path(__file__).parents[2]
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    stores = Stores(options.data.resolve(), options.work.resolve())
    if options.row:
        return _run_one(json.loads(options.row.read_text()), stores)
    configs = (
        grid.quick_configs() if options.quick else [c for table in options.only for c in grid.configs(table)]
    )
    configs = [config for config in configs if options.match in _name(config)]
    rows = Rows(stores.work / "rows")
    waiting = [c for c in configs if not rows.has(c) or (options.again and rows.failed(c))]
    try:
        stores.check(sorted(set().union(*(grid.sets_of(config) for config in waiting))))
    except AnnatacError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(configs)} rows, {len(configs) - len(waiting)} there already", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        for config in waiting:
            pool.submit(_in_process, config, stores, rows)
    failed = [_name(config) for config in configs if rows.failed(config)]
    print(json.dumps({"benchmark": "accuracy", "rows": len(configs), "ran": len(waiting), "failed": failed}))
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled h5ad files")
    parser.add_argument("--work", type=Path, required=True, help="folder of stores, models and rows; kept")
    parser.add_argument(
        "--only", nargs="+", choices=grid.TABLES, default=grid.TABLES, help="some of the tables"
    )
    parser.add_argument("--match", default="", help="only rows whose name has this text in it")
    parser.add_argument("--quick", action="store_true", help="a few short rows of cerebellum, for tests")
    parser.add_argument("--jobs", type=int, default=1, help="rows that run at the same time")
    parser.add_argument("--again", action="store_true", help="run the rows that failed again")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _in_process(config: grid.Config, stores: Stores, rows: Rows) -> None:
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


def _run_one(config: grid.Config, stores: Stores) -> int:
    clock = Clock()
    begin = time.perf_counter()
    figures = run(config, stores, clock)
    Rows(stores.work / "rows").write(
        config, figures, {**clock.seconds, "wall": round(time.perf_counter() - begin, 1)}
    )
    return 0


def _name(config: grid.Config) -> str:
    """What tells a row from the others of its table."""
    shown = ("table", "set", "select", "labels", "attend", "model", "trained", "seed")
    named = [
        f"{key} {config[key]}" if key in ("seed", "trained") else str(config[key])
        for key in shown
        if key in config
    ]
    return ", ".join(named)


if __name__ == "__main__":
    sys.exit(main())
