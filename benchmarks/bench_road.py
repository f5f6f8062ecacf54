"""Cost of each stage of the road on the shipped cerebellum data: wall and CPU seconds, cells/s, bytes.

    python benchmarks/bench_road.py [--quick] [--rounds N]

Ends with one line of JSON. CPU seconds are of this process; wall seconds mean little on a busy machine.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import anndata

import annatac_scale as ats

WHOLE = "cerebellum, 801 cells, all bins of mm9"
QUICK = "cerebellum, every fourth cell, the bins of chr1 of mm9"
LIBRARIES = ("annatac_scale", "torch", "zarr", "numpy", "numba", "dask")


def stages(folder: Path, data: Path, epochs: int) -> list[tuple[str, Callable[[], Any]]]:
    store, model = folder / "atlas.zarr", folder / "pre" / "model"
    return [
        ("convert", lambda: ats.convert(data, assembly="mm9", select="all", out=store)),
        ("pretrain", lambda: ats.pretrain(store, out=folder / "pre", epochs=epochs)),
        (
            "finetune",
            lambda: ats.finetune(store, model=model, labels="cell_type", out=folder / "ft", epochs=epochs),
        ),
        ("predict", lambda: ats.predict(store, model=folder / "ft" / "model", out=folder / "labels")),
        ("evaluate", lambda: ats.evaluate(folder / "labels", store=store, truth="cell_type")),
    ]


def quick_cells(shipped: Path, folder: Path) -> Path:
    """Every fourth cell, the peaks of one chromosome."""
    cells = anndata.read_h5ad(shipped)
    cells[::4, cells.var_names.str.startswith("chr1:")].copy().write_h5ad(folder / shipped.name)
    return folder / shipped.name


def one_round(data: Path, epochs: int) -> dict[str, tuple[float, float]]:
    """(wall, CPU) seconds of each stage."""
    folder = Path(tempfile.mkdtemp())
    try:
        seconds = {}
        for name, run in stages(folder, data, epochs):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seconds[name] = time.perf_counter() - wall, time.process_time() - cpu
        return seconds
    finally:
        shutil.rmtree(folder)


def commit() -> str:
    root = Path(__file__).parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few cells, one epoch, one round after the warm-up, under a minute",
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    epochs, rounds = (1, 1) if options.quick else (3, options.rounds)
    with (
        as_file(files("annatac_scale") / "data" / "cerebellum.h5ad") as shipped,
        tempfile.TemporaryDirectory() as scratch,
    ):
        data = quick_cells(shipped, Path(scratch)) if options.quick else shipped
        first = one_round(data, 1)
        measured = [one_round(data, epochs) for _ in range(rounds)]
    figures = {}
    for stage in first:
        cpu = sorted(seconds[stage][1] for seconds in measured)
        figures[stage] = {
            "cpu_s_median": round(statistics.median(cpu), 2),
            "cpu_s_min_max": [round(cpu[0], 2), round(cpu[-1], 2)],
            "wall_s_median": round(statistics.median(seconds[stage][0] for seconds in measured), 2),
            "cold_wall_s": round(first[stage][0], 2),
        }
        print(
            f"{stage:9} CPU {figures[stage]['cpu_s_median']:7.2f} s   wall {figures[stage]['wall_s_median']:7.2f} s"
        )
    print(
        json.dumps(
            {
                "benchmark": "road",
                "data": QUICK if options.quick else WHOLE,
                "epochs": epochs,
                "rounds": rounds,
                "stages": figures,
                "load": os.getloadavg()[0],
                "cores": os.cpu_count(),
                "machine": platform.machine(),
                "python": platform.python_version(),
                "versions": {name: version(name) for name in LIBRARIES},
                "commit": commit(),
            }
        )
    )


if __name__ == "__main__":
    main()
