"""What positions cost: CPU hours and memory of the TruncatedSVD of a store, beside scikit-learn's, how near they come.

    python benchmarks/bench_positions.py [--quick] [--data FOLDER] [--rounds 3] [--cases cost,sklearn,space] [--save]

Stores of ``store_writer.py``. Every run is a process of its own (``positions_work.py``), with the files in the page
cache and after a small decomposition of the same kind; CPU seconds are of the decomposition with all that it reads,
peak memory is of the process. Cases: cost (20,000 and 200,000 cells: is it linear? values idf and levels, two workers),
sklearn (20,000 cells held as CSR, and a reference of many passes from another start), space (600,000 islands). Ends
with one line of JSON.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import commands
import forked
from bench_stream import cpu_model
from measure import measured
from store_writer import Spec, make_store
from turns import Rounds, largest, ratio, spread, warm

RESULTS = Path(__file__).with_name("results") / "positions.json"
WORK = Path(__file__).with_name("positions_work.py")
LIMIT_S = 3_600
BAR_CORE_H = 0.5
"""Core-hours for a million cells at 16,657 islands, width 200."""

Figures = dict[str, Any]
BASE = Spec(cells=200_000)
WIDE = Spec(cells=20_000, islands=600_000, order="shuffled")


@dataclass(frozen=True)
class Bench:
    """Where and what is measured.

    n_iter: of scikit-learn, its default and the reference's; fork: runs of a process that has imported all
    """

    data: Path
    scratch: Path
    rounds: int = 3
    rank: int = 200
    base: Spec = BASE
    fewer: int = 20_000
    wide: Spec = WIDE
    n_iter: tuple[int, int] = (5, 20)
    fork: bool = False

    @classmethod
    def quick(cls, data: Path, scratch: Path) -> "Bench":
        small = replace(Spec.quick(), samples=1)
        wide = replace(small, islands=20_000, cells=1_000)
        return cls(data, scratch, 1, 16, small, 1_000, wide, (5, 12), fork=True)

    def store(self, spec: Spec) -> Path:
        path = make_store(self.data / spec.folder(), spec)
        warm(path)
        return path

    def run(self, name: str, **task: Any) -> Figures:
        """Figures of a process."""
        path, out = self.scratch / f"{name}.json", self.out(name)
        path.write_text(json.dumps({"rank": self.rank, "workers": 1, "out": str(out), **task}))
        if self.fork:
            figures = forked.measured(WORK, path, {}, ["warm_kernels"])
        else:
            command = [sys.executable, str(WORK), str(path)]
            figures = measured(command, commands.ROOT, commands.ENVIRONMENT, LIMIT_S)
        printed = figures.pop("printed")
        if "failed" in figures:
            print(f"{name:20} {figures['failed']}", flush=True)
            return figures
        figures.update(json.loads(printed))
        if "svd_cpu_s" in figures:
            print(
                f"{name:20} {figures['svd_cpu_s']:8.1f} s CPU   {figures['core_h_per_million']:7.3f} core-hours a"
                f" million cells   peak {figures['rss_mb']:6.0f} MB   load {figures['load']:4.1f}",
                flush=True,
            )
        return figures

    def out(self, name: str) -> Path:
        return self.scratch / f"{name}.npz"

    def take_turns(self, tasks: Mapping[str, Figures]) -> Rounds:
        found: Rounds = {name: [] for name in tasks}
        for _ in range(self.rounds):
            for name, task in tasks.items():
                if not any("failed" in one for one in found[name]):
                    found[name].append(self.run(name, **task))
        return found


SPREAD = ("svd_cpu_s", "svd_wall_s", "core_h_per_million")
LAST = ("cells", "islands", "passes")


def summary(rounds_of: Sequence[Figures]) -> Figures:
    last = rounds_of[-1]
    if "failed" in last:
        return {"failed": last["failed"]}
    return {
        **{name: spread(one[name] for one in rounds_of) for name in SPREAD},
        **{name: last[name] for name in LAST if name in last},
        "rss_mb": max(one["rss_mb"] for one in rounds_of),
        "load": max(one["load"] for one in rounds_of),
    }


def summaries(found: Rounds) -> dict[str, Figures]:
    return {name: summary(rounds_of) for name, rounds_of in found.items()}


def per_cell(found: Rounds, more: str, fewer: str) -> float | None:
    """Core-hours for a million cells more: what the bigger run takes beyond the smaller, by the cells between them."""
    rounds_of = [found[more], found[fewer]]
    if any("failed" in one for of in rounds_of for one in of):
        return None
    grown = [
        (big["svd_cpu_s"] - small["svd_cpu_s"]) / (big["cells"] - small["cells"])
        for big, small in zip(*rounds_of, strict=True)
    ]
    return round(sorted(grown)[len(grown) // 2] * 1e6 / 3_600, 4)


def cost(bench: Bench) -> Figures:
    """Both values, and how the cost grows with cells and is shared by workers."""
    base = str(bench.store(bench.base))
    fewer = str(bench.store(replace(bench.base, cells=bench.fewer)))
    tasks = {
        f"{values}_{size}": {"work": "ours", "store": store, "cells": cells, "values": values}
        for values in ("idf", "levels")
        for size, store, cells in (("fewer", fewer, bench.fewer), ("base", base, bench.base.cells))
    }
    tasks["idf_base_2_workers"] = {**tasks["idf_base"], "workers": 2}
    found = bench.take_turns(tasks)
    return {
        "runs": summaries(found),
        "ratios": {
            "base_over_fewer_per_cell": ratio(found, "idf_base", "idf_fewer", "core_h_per_million"),
            "levels_over_idf": ratio(found, "levels_base", "idf_base", "core_h_per_million"),
            "2_workers_over_1_wall": ratio(found, "idf_base_2_workers", "idf_base", "svd_wall_s"),
            "2_workers_over_1_cpu": ratio(found, "idf_base_2_workers", "idf_base", "svd_cpu_s"),
        },
        "bars": {"core_h_per_million": largest(found, "core_h_per_million", ["idf_base", "levels_base"])},
    }


def sklearn(bench: Bench) -> Figures:
    """Beside scikit-learn on cells that it can hold, and both beside a reference."""
    store = str(bench.store(replace(bench.base, cells=bench.fewer)))
    shared = {"store": store, "cells": bench.fewer, "values": "idf"}
    few, many = bench.n_iter
    found = bench.take_turns(
        {"ours": {"work": "ours", **shared}, "sklearn": {"work": "sklearn", "n_iter": few, **shared}}
    )
    reference = {"reference": [bench.run("reference", work="sklearn", n_iter=many, seed=1, **shared)]}
    compared = bench.run(
        "compare",
        work="compare",
        reference=str(bench.out("reference")),
        found={name: str(bench.out(name)) for name in found},
        leading=[n for n in (5, 30, bench.rank) if n <= bench.rank],
        **shared,
    )
    return {
        "n_iter": {"sklearn": few, "reference": many},
        "runs": summaries({**found, **reference}),
        "accuracy": {name: compared.get(name, compared.get("failed")) for name in found},
        "ratios": {"sklearn_over_ours": ratio(found, "sklearn", "ours", "svd_cpu_s")},
        "bars": {},
    }


def space(bench: Bench) -> Figures:
    """A space of many islands: memory, and what a million cells take, from two sizes of it."""
    store = str(bench.store(bench.wide))
    tasks = {
        name: {"work": "ours", "store": store, "cells": cells, "values": "idf", "workers": workers}
        for name, cells, workers in (
            ("wide_quarter", bench.wide.cells // 4, 1),
            ("wide", bench.wide.cells, 1),
            ("wide_2_workers", bench.wide.cells, 2),
        )
    }
    found = bench.take_turns(tasks)
    return {
        "runs": summaries(found),
        "more_core_h_per_million": per_cell(found, "wide", "wide_quarter"),
        "table_mb": round(summary(found["wide"]).get("islands", 0) * (bench.rank + 10) * 4 / 1e6),
        "bars": {},
    }


CASES = {"cost": cost, "sklearn": sklearn, "space": space}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small stores, one round, for tests")
    parser.add_argument("--data", type=Path, help="folder that keeps the stores; default: none is kept")
    parser.add_argument("--rounds", type=int, default=3)
    commands.add_cases(parser, CASES)
    parser.add_argument("--save", action="store_true", help=f"write the JSON into results/{RESULTS.name} too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        data = (options.data or scratch / "data").resolve()
        bench = Bench.quick(data, scratch) if options.quick else Bench(data, scratch, options.rounds)
        cases = {name: CASES[name](bench) for name in options.cases}
    found = cases.get("cost", {}).get("bars", {}).get("core_h_per_million")
    bars = (
        {}
        if options.quick or found is None
        else {
            "core_h_per_million": {
                "found": found,
                "bar": f"<= {BAR_CORE_H}",
                "met": found <= BAR_CORE_H,
            }
        }
    )
    report = {
        "benchmark": "positions",
        "warm": True,
        "rank": bench.rank,
        "rounds": bench.rounds,
        "cases": cases,
        "bars": bars,
        "failed": commands.failures(cases),
        "cpu": cpu_model(),
        **commands.conditions(),
    }
    commands.end(report, RESULTS if options.save else None)


if __name__ == "__main__":
    main()
