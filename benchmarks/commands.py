"""The command lines that the benchmarks run: ours through ``annatac``, the peers through their own Python."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from fragments import FragmentSet, Genome

from annatac_scale.genome.annotation import builtin_tss

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("annatac_scale", "numpy", "numba", "dask", "zarr")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ANNATAC = [sys.executable, "-m", "annatac_scale"]
PEER_WORK = Path(__file__).with_name("peer_work.py")


@lru_cache
def help_of(command: str) -> str:
    return printed([*ANNATAC, command, "--help"])


def convert(made: FragmentSet, out: Path, assembly: str, workers: int = 1, qc: bool = False) -> list[str]:
    """The conversion of one generated set."""
    files = ["--barcodes", str(made.barcodes), "--peaks", str(made.peaks)]
    return [*ANNATAC, "convert", str(made.fragments), *files, *_shared(out, assembly, workers, qc)]


def convert_sheet(sheet: Path, out: Path, assembly: str, workers: int = 1) -> list[str]:
    """The conversion of a sheet that names the peaks and barcodes of its samples."""
    return [*ANNATAC, "convert", "--sheet", str(sheet), *_shared(out, assembly, workers, qc=False)]


def _shared(out: Path, assembly: str, workers: int, qc: bool) -> list[str]:
    quiet = ["--no-qc"] if not qc and "--no-qc" in help_of("convert") else []
    return ["--assembly", assembly, "--out", str(out), "--workers", str(workers), *quiet]


def digest(store: Path) -> str:
    """What ``annatac info STORE --digest`` says."""
    return printed([*ANNATAC, "info", str(store), "--digest"])


def printed(command: Sequence[str]) -> str:
    """Stdout of a command that ends well; else SystemExit with its last line."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:5])} ...: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.strip()


def peer(python: Path, folder: Path, name: str, **task: Any) -> list[str]:
    """A peer's work as a command; its task is written into ``folder``, which it may fill."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "task.json"
    path.write_text(json.dumps({"peer": name, "folder": str(folder), **task}))
    return [str(python), str(PEER_WORK), str(path)]


def snapatac2_task(made: FragmentSet, assembly: str, strategies: Sequence[str]) -> dict[str, Any]:
    genome = Genome.of(assembly)
    sizes = dict(zip(genome.names, genome.sizes.tolist(), strict=True))
    files = {name: str(path) for name, path in made._asdict().items()}
    return {**files, "sizes": sizes, "strategies": list(strategies)}


def write_genes(path: Path, assembly: str) -> Path:
    """The TSS that ours uses as a GTF of transcripts of 1 kb, for the peers that want one."""
    with path.open("w") as file:
        for row in builtin_tss(assembly).itertuples():
            forward = row.strand != "-"
            start, end = (
                (row.position + 1, row.position + 1_000)
                if forward
                else (max(row.position - 998, 1), row.position + 1)
            )
            keys = f'gene_id "{row.gene}"; transcript_id "{row.gene}"; gene_name "{row.gene}";'
            strand = "+" if forward else "-"
            file.write(f"{row.chrom}\tannatac\ttranscript\t{start}\t{end}\t.\t{strand}\t.\t{keys}\n")
    return path


def failures(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Runs that failed, as case/run."""
    return [
        f"{case}/{name}"
        for case, found in cases.items()
        for name, figures in found["runs"].items()
        if "failed" in figures
    ]


def add_cases(parser: argparse.ArgumentParser, known: Iterable[str]) -> None:
    """The option --cases: some of the known ones, as A,B; the parser gives a list, and refuses others."""
    names = list(known)

    def chosen(given: str) -> list[str]:
        asked = given.split(",")
        if unknown := set(asked) - set(names):
            raise argparse.ArgumentTypeError(
                f"found {', '.join(sorted(unknown))}; expected some of {', '.join(names)}"
            )
        return asked

    parser.add_argument(
        "--cases", type=chosen, default=names, metavar="A,B", help=f"default {','.join(names)}"
    )


def end(report: Mapping[str, Any], results: Path | None) -> NoReturn:
    """End a benchmark: report kept in ``results`` and printed as one line; the exit code tells whether a run failed."""
    if results is not None:
        results.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    raise SystemExit(1 if report["failed"] else 0)


def conditions() -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": commit.stdout.strip(),
    }
