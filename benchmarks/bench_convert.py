"""The converter's cost beside its peers', on generated fragments: CPU and wall seconds and peak memory.

    python benchmarks/bench_convert.py [--quick] [--data FOLDER] [--peer-python PATH] [--cases peers,memory,...]

Every figure is of a whole process, start-up included, on one worker where nothing else is said; the runs of a case
take turns, ``--rounds`` times. Cases: peers (SnapATAC2, BPCells, decompression alone, 1 and 2 workers), memory (lines,
cells and peaks varied), formats (of the file), sheet (many small samples). Ends with one line of JSON.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import commands
from fragments import FragmentSet, Spec, add_options, make, spec_of
from measure import measured

RESULTS = Path(__file__).with_name("results") / "convert.json"
LIMIT_S = 3_600


@dataclass(frozen=True)
class Run:
    """One command of a case; ``folder`` is its own, and is emptied before and after it."""

    name: str
    command: Sequence[str]
    folder: Path
    env: Mapping[str, str] = field(default_factory=dict)
    once: bool = False


@dataclass(frozen=True)
class Bench:
    """Where things are and how often they run."""

    spec: Spec
    data: Path
    scratch: Path
    rounds: int
    peer_python: Path | None
    quick: bool

    def made(self, spec: Spec, below: str = "") -> FragmentSet:
        return make(self.data / below / spec.folder(), spec)

    def ours(self, name: str, made: FragmentSet, workers: int = 1, qc: bool = False, **more: Any) -> Run:
        folder = self.scratch / name
        return Run(
            name, commands.convert(made, folder / "store", self.spec.assembly, workers, qc), folder, **more
        )

    def peer(self, name: str, peer: str, **task: Any) -> Run:
        folder = self.scratch / name
        assert self.peer_python is not None
        return Run(name, commands.peer(self.peer_python, folder, peer, **task), folder)


def run_all(runs: Sequence[Run], rounds: int) -> dict[str, dict[str, Any]]:
    """Figures by run; the runs take turns."""
    found: dict[str, list[dict[str, Any]]] = {run.name: [] for run in runs}
    for number in range(rounds):
        for run in runs:
            if number and (run.once or "failed" in found[run.name][-1]):
                continue
            figures = run_once(run)
            found[run.name].append(figures)
            print(_line(run.name, number, figures), flush=True)
    return {name: summary(rounds_of) for name, rounds_of in found.items()}


def run_once(run: Run) -> dict[str, Any]:
    task = run.folder / "task.json"
    kept = task.read_text() if task.exists() else None
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    if kept is not None:
        task.write_text(kept)
    try:
        return measured(run.command, commands.ROOT, {**commands.ENVIRONMENT, **run.env}, LIMIT_S)
    finally:
        for path in run.folder.iterdir():
            if path != task:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _line(name: str, number: int, figures: Mapping[str, Any]) -> str:
    if "failed" in figures:
        return f"{name:28} round {number}  {figures['failed']}"
    return (
        f"{name:28} round {number}  CPU {figures['cpu_s']:8.2f} s   wall {figures['wall_s']:8.2f} s   "
        f"peak {figures['rss_mb']:7.0f} MB   load {figures['load']:.1f}"
    )


def summary(rounds_of: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median and spread over the rounds, or why there are none."""
    if "failed" in rounds_of[-1]:
        return {"failed": rounds_of[-1]["failed"]}
    cpu = [figures["cpu_s"] for figures in rounds_of]
    wall = [figures["wall_s"] for figures in rounds_of]
    found = {
        "cpu_s_median": round(statistics.median(cpu), 2),
        "cpu_s_min_max": [min(cpu), max(cpu)],
        "wall_s_median": round(statistics.median(wall), 2),
        "wall_s_min_max": [min(wall), max(wall)],
        "rss_mb": max(figures["rss_mb"] for figures in rounds_of),
        "tree_rss_mb": max(figures["tree_rss_mb"] for figures in rounds_of),
        "load_max": max(figures["load"] for figures in rounds_of),
        "rounds": len(rounds_of),
    }
    last = rounds_of[-1]["printed"]
    return {**found, "steps_cpu_s": json.loads(last)} if last.startswith("{") else found


def ratio(runs: Mapping[str, Mapping[str, Any]], over: str, under: str, what: str) -> float | None:
    """``over`` / ``under`` of a figure, None where one of both did not run."""
    both = [runs.get(name, {}).get(what) for name in (over, under)]
    return round(both[0] / both[1], 3) if all(both) else None


def ratios(
    runs: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, tuple[str, str, str]]
) -> dict[str, float]:
    found = {name: ratio(runs, *given) for name, given in wanted.items()}
    return {name: value for name, value in found.items() if value is not None}


def case_peers(bench: Bench) -> dict[str, Any]:
    """SnapATAC2 and BPCells on the same file with the same barcodes; one worker and two."""
    made = bench.made(bench.spec)
    empty = bench.made(replace(bench.spec, lines=1_000))
    runs = [bench.ours("ours", made), bench.ours("ours_2_workers", made, workers=2)]
    if "--no-qc" in commands.help_of("convert"):
        runs.append(bench.ours("ours_qc", made, qc=True))
    else:
        print("ours_qc: skipped, this annatac has no QC to turn off")
    if not bench.quick:
        cold = {"NUMBA_CACHE_DIR": str(bench.scratch / "ours_cold" / "numba")}
        runs.append(bench.ours("ours_cold", empty, env=cold, once=True))
        runs.append(bench.ours("ours_start", empty))
    runs += _peer_runs(bench, made)
    found = run_all(runs, bench.rounds)
    cpu, wall = "cpu_s_median", "wall_s_median"
    wanted = {
        "snapatac2_over_ours_cpu": ("snapatac2_paired_insertion", "ours", cpu),
        "snapatac2_insertion_over_ours_cpu": ("snapatac2_insertion", "ours", cpu),
        "snapatac2_over_ours_qc_cpu": ("snapatac2_paired_insertion", "ours_qc", cpu),
        "snapatac2_qc_over_ours_qc_cpu": ("snapatac2_qc", "ours_qc", cpu),
        "snapatac2_over_ours_wall": ("snapatac2_paired_insertion", "ours", wall),
        "ours_over_bpcells_import_cpu": ("ours", "bpcells_import", cpu),
        "ours_over_inflate_cpu": ("ours", "inflate", cpu),
        "ours_qc_over_ours_cpu": ("ours_qc", "ours", cpu),
        "two_workers_over_one_wall": ("ours_2_workers", "ours", wall),
        "two_workers_over_one_cpu": ("ours_2_workers", "ours", cpu),
    }
    return {"runs": found, "ratios": ratios(found, wanted)}


def _peer_runs(bench: Bench, made: FragmentSet) -> list[Run]:
    if bench.peer_python is None:
        print("peers: skipped, no --peer-python given")
        return []
    files = {name: str(path) for name, path in made._asdict().items()}
    genes = commands.write_genes(bench.data / f"{bench.spec.assembly}.gtf", bench.spec.assembly)

    def snapatac2(name: str, strategy: str, **more: Any) -> Run:
        task = commands.snapatac2_task(made, bench.spec.assembly, [strategy])
        return bench.peer(name, "snapatac2", **task, **more)

    return [
        snapatac2("snapatac2_paired_insertion", "paired-insertion"),
        snapatac2("snapatac2_insertion", "insertion"),
        snapatac2("snapatac2_qc", "paired-insertion", genes=str(genes)),
        bench.peer("bpcells_import", "bpcells", **files),
        bench.peer("inflate", "inflate", **files),
    ]


def case_memory(bench: Bench) -> dict[str, Any]:
    """Five times the lines, forty times the cells, 1k to 300k peaks: memory flat, time linear in lines only."""
    base = bench.spec
    many = 40 * base.cells
    specs = {
        "base": base,
        "lines_x5": replace(base, lines=5 * base.lines),
        "cells_x40": replace(base, cells=many),
        "peaks_1k": replace(base, peaks=1_000),
        "peaks_300k": replace(base, peaks=300_000),
    }
    if bench.quick:
        specs = {name: specs[name] for name in ("base", "cells_x40")}
    runs = [bench.ours(name, bench.made(spec)) for name, spec in specs.items()]
    wanted = {}
    if not bench.quick:
        runs.append(bench.ours("lines_x5_2_workers", bench.made(specs["lines_x5"]), workers=2))
        wanted["lines_x5_two_workers_over_one_wall"] = ("lines_x5_2_workers", "lines_x5", "wall_s_median")
    found = run_all(runs, bench.rounds)
    for name in ("lines_x5", "cells_x40", "peaks_1k", "peaks_300k"):
        wanted[f"{name}_over_base_rss"] = (name, "base", "rss_mb")
        wanted[f"{name}_over_base_cpu"] = (name, "base", "cpu_s_median")
    wanted["peaks_300k_over_1k_cpu"] = ("peaks_300k", "peaks_1k", "cpu_s_median")
    more_bytes = (found["cells_x40"].get("rss_mb", 0) - found["base"].get("rss_mb", 0)) * 1e6
    return {
        "specs": {name: asdict(spec) for name, spec in specs.items()},
        "runs": found,
        "ratios": ratios(found, wanted),
        "bytes_a_barcode": round(more_bytes / (many - base.cells)),
    }


def case_formats(bench: Bench) -> dict[str, Any]:
    """The same lines as BGZF, one gzip member, plain text and zstd."""
    names = ("bgzf", "text") if bench.quick else ("bgzf", "gzip", "text", "zstd")
    runs = [bench.ours(name, bench.made(replace(bench.spec, compression=name))) for name in names]
    found = run_all(runs, bench.rounds)
    wanted = {f"{name}_over_bgzf_cpu": (name, "bgzf", "cpu_s_median") for name in names[1:]}
    return {"runs": found, "ratios": ratios(found, wanted)}


def case_sheet(bench: Bench) -> dict[str, Any]:
    """A sheet of small samples beside one sample that holds as many lines and cells as all of them.

    The overhead is what the sheet costs more, for 100 samples: CPU and wall seconds.
    """
    n = 4 if bench.quick else 200
    small = replace(bench.spec, lines=20_000, cells=100, ambient=200, level=1)
    made = [bench.made(replace(small, seed=1_000 + number), "sheet") for number in range(n)]
    peaks = bench.made(replace(small, seed=999)).peaks
    sheet = bench.data / "sheet" / f"{n}.tsv"
    rows = (f"s{number:03}\t{one.fragments}\t{peaks}\t{one.barcodes}\n" for number, one in enumerate(made))
    sheet.write_text("sample\tpath\tpeaks\tbarcodes\n" + "".join(rows))
    whole = bench.made(
        replace(small, lines=n * small.lines, cells=n * small.cells, ambient=n * small.ambient)
    )
    folder = bench.scratch / "sheet"
    runs = [
        Run("sheet", commands.convert_sheet(sheet, folder / "store", small.assembly), folder),
        bench.ours("one_sample_of_all_lines", whole._replace(peaks=peaks)),
        bench.ours("one_small_sample", made[0]._replace(peaks=peaks)),
    ]
    found = run_all(runs, bench.rounds)
    overhead = {}
    for what in ("cpu_s_median", "wall_s_median"):
        both = [found[name].get(what) for name in ("sheet", "one_sample_of_all_lines")]
        if None not in both:
            overhead[what.removesuffix("_median")] = round((both[0] - both[1]) * 100 / n, 2)
    return {"samples": n, "runs": found, "overhead_per_100_samples": overhead}


CASES = {"peers": case_peers, "memory": case_memory, "formats": case_formats, "sheet": case_sheet}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder that keeps what is generated; default: none is kept"
    )
    parser.add_argument("--peer-python", type=Path, help="Python that has snapatac2, bpcells and isal")
    commands.add_cases(parser, CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"write the JSON into results/{RESULTS.name} too")
    add_options(parser)
    options = parser.parse_args()
    if options.peer_python is not None and not options.peer_python.exists():
        print(f"peers: skipped, {options.peer_python} is not there")
        options.peer_python = None
    return options


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.data and options.data.parent) as temporary:
        folder = Path(temporary)
        bench = Bench(
            spec_of(options),
            (options.data or folder / "data").resolve(),
            folder / "runs",
            1 if options.quick else options.rounds,
            options.peer_python,
            options.quick,
        )
        bench.data.mkdir(parents=True, exist_ok=True)
        if not bench.quick:
            run_once(bench.ours("warm_up", bench.made(Spec.quick())))
        cases = {name: CASES[name](bench) for name in options.cases}
        peers = {}
        if bench.peer_python is not None:
            task = commands.peer(bench.peer_python, folder / "versions", "versions")
            peers = json.loads(commands.printed(task))
    report = {
        "benchmark": "convert",
        "warm": True,
        "spec": asdict(bench.spec),
        "cases": cases,
        "peers": peers,
        "failed": commands.failures(cases),
        **commands.conditions(),
    }
    commands.end(report, RESULTS if options.save else None)


if __name__ == "__main__":
    main()
