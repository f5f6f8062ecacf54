"""Are our values those of SnapATAC2, entry by entry, under each counting strategy?

    python benchmarks/compare_snapatac2.py --peer-python PATH [--data FOLDER] [--lines N] [--real FOLDER] [--save]

Sets: a generated one, real files (``--real``: a folder that has some of REAL), and ``edges``: a barcode for each odd
line, so that what a difference comes from is seen. Two views of each set:

- peaks: disjoint windows that are both the islands and the peaks of our store, so that a value is min(count, 5);
- islands: all 5 kb bins, over peaks that also overlap and are not sorted: min(ceil(S / n), 5) in integers, from
  SnapATAC2's counts of each peak.

Windows of real files are cut at the starts and ends of their own fragments and one base beside them, where an error
of one base shows. Ends with one line of JSON; exit 1 where an entry differs outside ``edges``.
"""

import argparse
import gzip
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import commands
import numpy as np
import pandas as pd
from fragments import Spec, make
from scipy import sparse

import annatac_scale as ats
from annatac_scale.genome.assembly import Assembly
from annatac_scale.ingest.convert import ConvertOptions
from annatac_scale.store.store import IslandStore

STRATEGIES = ("insertion", "fragment", "paired-insertion")
RESULTS = Path(__file__).with_name("results") / "compare_snapatac2.json"
BIN_BP, MAX_LEVEL = 5_000, 5
REAL = {
    "muon_test_rna_atac_fragments.tsv.gz": "hg38",
    "snapatac2_test_single.tsv.gz": "hg38",
    "snapatac2_test.bed.gz": "hg38",
    "scframework_liver_fragments_sorted.bed": "hg38",
    "archr_PBSmall.tsv.gz": "hg19",
    "bpcells_mini_fragments.tsv.gz": "hg19",
    "signac_fragments_header.tsv.gz": "hg19",
    "peakqc_mm10_atac_fragments.bed": "mm10",
    "sft_a.fragments.tsv.gz": "hg38",
    "sft_b.fragments.tsv.gz": "hg38",
}


class DataSet(NamedTuple):
    name: str
    assembly: str
    fragments: Path
    barcodes: Path
    disjoint: Path
    overlapping: Path
    lines: int
    invalid: int


def read_lines(path: Path) -> pd.DataFrame:
    """The first four columns; names and barcodes as they are."""
    return pd.read_csv(
        path,
        sep="\t",
        comment="#",
        header=None,
        usecols=range(4),
        names=["chrom", "start", "end", "barcode"],
        dtype={"chrom": str, "barcode": str},
    )


def cut_windows(rng: np.random.Generator, lines: pd.DataFrame, assembly: Assembly, n: int) -> pd.DataFrame:
    """About ``n`` disjoint windows between ends of fragments, many touching, none longer than 2 kb."""
    windows = []
    for chrom, own in lines.groupby("chrom", sort=True):
        code = assembly.code(str(chrom))
        if code is None:
            continue
        ends = np.concatenate([own["start"], own["start"] + 1, own["end"] - 1, own["end"]])
        share = min(1.0, n * len(own) / len(lines) / len(ends))
        cuts = np.unique(ends[rng.random(len(ends)) < share].clip(0, assembly.sizes[code]))
        start, end = cuts[:-1], np.minimum(cuts[1:], cuts[:-1] + 2_000)
        kept = rng.random(len(start)) < 0.8
        windows.append(pd.DataFrame({"chrom": chrom, "start": start[kept], "end": end[kept]}))
    return pd.concat(windows, ignore_index=True)


def overlap(rng: np.random.Generator, windows: pd.DataFrame) -> pd.DataFrame:
    """The windows and, for a third of them, one that begins 30 bp later inside and ends outside; shuffled."""
    more = windows[(windows["end"] - windows["start"] > 60) & (rng.random(len(windows)) < 0.33)]
    more = more.assign(start=more["start"] + 30, end=more["end"] + 20)
    both = pd.concat([windows, more]).drop_duplicates()
    return both.sample(frac=1, random_state=int(rng.integers(2**31)))


def write_bed(path: Path, table: pd.DataFrame) -> Path:
    table.to_csv(path, sep="\t", header=False, index=False)
    return path


def real_set(path: Path, assembly: str, folder: Path) -> DataSet:
    folder.mkdir(parents=True, exist_ok=True)
    genome = Assembly.builtin(assembly)
    lines = read_lines(path)
    valid = lines["end"] > lines["start"]
    rng = np.random.default_rng(0)
    windows = cut_windows(rng, lines[valid], genome, 20_000)
    inside = windows["end"] + 20 <= windows["chrom"].map(
        dict(zip(genome.chromosomes, genome.sizes, strict=True))
    )
    windows = windows[inside]
    (folder / "barcodes.txt").write_text("".join(f"{name}\n" for name in lines["barcode"].unique()))
    return DataSet(
        path.name,
        assembly,
        path,
        folder / "barcodes.txt",
        write_bed(folder / "disjoint.bed", windows),
        write_bed(folder / "overlapping.bed", overlap(rng, windows)),
        len(lines),
        int((~valid).sum()),
    )


def generated_set(spec: Spec, kept: Path, folder: Path) -> DataSet:
    made = make(kept / spec.folder(), spec)
    windows = pd.read_csv(made.peaks, sep="\t", header=None, names=["chrom", "start", "end"])
    rng = np.random.default_rng(0)
    more = write_bed(folder / "overlapping.bed", overlap(rng, windows))
    return DataSet("generated", spec.assembly, made.fragments, made.barcodes, made.peaks, more, spec.lines, 0)


EDGES = {
    # name: (chromosome, start, end, how many lines)
    "inside_peak": ("chr1", 1_010_000, 1_010_300, 1),
    "same_line_twice": ("chr1", 1_010_000, 1_010_300, 2),
    "starts_on_peak_start": ("chr1", 1_009_900, 1_011_000, 1),
    "starts_on_peak_end": ("chr1", 1_010_400, 1_011_000, 1),
    "starts_on_peak_last_base": ("chr1", 1_010_399, 1_011_000, 1),
    "ends_on_peak_start": ("chr1", 1_009_000, 1_009_900, 1),
    "ends_on_peak_first_base": ("chr1", 1_009_000, 1_009_901, 1),
    "ends_on_peak_end": ("chr1", 1_009_000, 1_010_400, 1),
    "spans_peak": ("chr1", 1_009_000, 1_012_000, 1),
    "one_base": ("chr1", 1_010_100, 1_010_101, 1),
    "chrM": ("chrM", 1_000, 1_200, 1),
    "ends_at_chromosome_end": ("chr21", 46_709_800, 46_709_983, 1),
    "ends_past_chromosome": ("chr21", 46_709_800, 46_710_050, 1),
    "scaffold": ("chr1_KI270706v1_random", 1_000, 1_200, 1),
    "zero_length": ("chr1", 1_010_100, 1_010_100, 1),
    "reversed": ("chr1", 1_010_200, 1_010_100, 1),
}
EDGE_PEAKS = [
    ("chr1", 1_009_900, 1_010_400),
    ("chr21", 46_709_700, 46_709_983),
    ("chrM", 900, 1_300),
    ("chr1_KI270706v1_random", 900, 1_300),
]


def edge_set(folder: Path) -> DataSet:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        f"{chrom}\t{start}\t{end}\t{name}\t1\n"
        for name, (chrom, start, end, times) in EDGES.items()
        for _ in range(times)
    ]
    (folder / "fragments.tsv.gz").write_bytes(gzip.compress("".join(rows).encode()))
    (folder / "barcodes.txt").write_text("".join(f"{name}\n" for name in EDGES))
    peaks = write_bed(folder / "peaks.bed", pd.DataFrame(EDGE_PEAKS))
    invalid = sum(end <= start for _, start, end, _ in EDGES.values())
    return DataSet(
        "edges",
        "hg38",
        folder / "fragments.tsv.gz",
        folder / "barcodes.txt",
        peaks,
        peaks,
        len(rows),
        invalid,
    )


def theirs(given: DataSet, python: Path, folder: Path) -> dict[tuple[str, str], pd.DataFrame | Any]:
    """SnapATAC2's counts: (view, strategy) -> (CSR in the order of our barcodes, peaks)."""
    genome = Assembly.builtin(given.assembly)
    task = {
        "fragments": str(given.fragments),
        "barcodes": str(given.barcodes),
        "sizes": dict(zip(genome.chromosomes, genome.sizes, strict=True)),
        "peak_files": {"peaks": str(given.disjoint), "islands": str(given.overlapping)},
        "strategies": STRATEGIES,
    }
    commands.printed(commands.peer(python, folder, "matrices", **task))
    order = given.barcodes.read_text().splitlines()
    return {
        (view, strategy): _aligned(np.load(folder / f"{view}_{strategy}.npz"), order)
        for view in task["peak_files"]
        for strategy in STRATEGIES
    }


def _aligned(found: Mapping[str, np.ndarray], order: Sequence[str]) -> tuple[sparse.csr_array, list[str]]:
    counts = sparse.csr_array(
        (found["data"].astype(np.int64), found["indices"], found["indptr"]),
        shape=(len(found["barcodes"]), len(found["peaks"])),
    ).tocoo()
    row = pd.Index(order).get_indexer(found["barcodes"])
    placed = sparse.csr_array(
        (counts.data, (row[counts.row], counts.col)), shape=(len(order), counts.shape[1])
    )
    return placed, found["peaks"].tolist()


def ours(given: DataSet, view: str, strategy: str, folder: Path) -> tuple[sparse.csr_array, list[str]]:
    """Our values as (CSR, names of islands)."""
    out = folder / f"{view}_{strategy}.zarr"
    lenient = {"on_invalid": "count"} if "on_invalid" in ConvertOptions.__dataclass_fields__ else {}
    ats.convert(
        given.fragments,
        assembly=given.assembly,
        out=out,
        select=str(given.disjoint) if view == "peaks" else "all",
        peaks=given.disjoint if view == "peaks" else given.overlapping,
        barcodes=given.barcodes,
        counting=strategy,
        **lenient,
    )
    store = IslandStore.open(out)
    cells = store.read(np.arange(store.n_cells))
    order = pd.Index(store.obs()["barcode"]).get_indexer(given.barcodes.read_text().splitlines())
    values = sparse.csr_array(
        (cells.levels.astype(np.int64), cells.islands, cells.offsets),
        shape=(store.n_cells, len(store.space)),
    )
    return values[order], list(store.space.names())


def expected_islands(
    counts: sparse.csr_array, peaks: Sequence[str], names: Sequence[str]
) -> sparse.csr_array:
    """min(ceil(S / n), 5) by bins of 5 kb; a peak belongs to the bin of its start. Signed integers."""
    place = pd.Series(peaks).str.extract(r"(.+):(\d+)-(\d+)")
    begin = place[1].astype(int) // BIN_BP * BIN_BP
    number = {name.rsplit("-", 1)[0]: island for island, name in enumerate(names)}
    island = np.array([number[f"{chrom}:{start}"] for chrom, start in zip(place[0], begin, strict=True)])
    n = np.bincount(island, minlength=len(names))
    summing = sparse.csr_array(
        (np.ones(len(peaks), np.int64), (np.arange(len(peaks)), island)), shape=(len(peaks), len(names))
    )
    sums = (counts @ summing).tocsr()
    sums.data = np.minimum(-(-sums.data // n[sums.indices]), MAX_LEVEL)
    return sums


def expected_peaks(counts: sparse.csr_array, peaks: Sequence[str], names: Sequence[str]) -> sparse.csr_array:
    """min(count, 5) in the order of our windows."""
    column = pd.Index(names).get_indexer(pd.Index(peaks))
    if (column < 0).any():
        raise SystemExit(
            f"peaks: SnapATAC2 has {peaks[int((column < 0).argmax())]}, which is no window of ours"
        )
    found = counts.tocoo()
    return sparse.csr_array(
        (np.minimum(found.data, MAX_LEVEL), (found.row, column[found.col])),
        shape=(counts.shape[0], len(names)),
    )


def compared(given: DataSet, python: Path, folder: Path) -> Iterator[dict[str, Any]]:
    matrices = theirs(given, python, folder / "snapatac2")
    barcodes = given.barcodes.read_text().splitlines()
    for (view, strategy), (counts, peaks) in matrices.items():
        values, names = ours(given, view, strategy, folder)
        expect = expected_peaks if view == "peaks" else expected_islands
        wanted = expect(counts, peaks, names)
        difference = (values - wanted).tocoo()
        wrong = np.flatnonzero(difference.data)
        places = zip(difference.row[wrong][:20].tolist(), difference.col[wrong][:20].tolist(), strict=True)
        examples = [
            {
                "barcode": barcodes[row],
                "at": names[column],
                "ours": int(values[row, column]),
                "snapatac2": int(wanted[row, column]),
            }
            for row, column in places
        ]
        print(
            f"{given.name:40} {view:8} {strategy:17} {wanted.nnz:9} entries, {len(wrong)} differ", flush=True
        )
        yield {
            "set": given.name,
            "assembly": given.assembly,
            "lines": given.lines,
            "invalid_lines": given.invalid,
            "cells": len(barcodes),
            "view": view,
            "counting": strategy,
            "entries": int(wanted.nnz),
            "sum_of_counts": int(counts.sum()),
            "differ": len(wrong),
            "examples": examples,
        }


def data_sets(options: argparse.Namespace, folder: Path) -> Iterator[DataSet]:
    yield edge_set(folder / "edges")
    spec = Spec(lines=options.lines) if not options.quick else Spec.quick()
    yield generated_set(spec, options.data or folder, folder)
    for name, assembly in REAL.items():
        if options.real is not None and (options.real / name).exists():
            yield real_set(options.real / name, assembly, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", type=Path, required=True, help="Python that has snapatac2")
    parser.add_argument("--data", type=Path, help="folder that keeps what is generated")
    parser.add_argument("--lines", type=lambda text: int(float(text)), default=2_000_000)
    parser.add_argument("--real", type=Path, help=f"folder with real files: {', '.join(REAL)}")
    parser.add_argument("--quick", action="store_true", help="50,000 lines")
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULTS.name}")
    options = parser.parse_args()
    if not options.peer_python.exists():
        print(f"skipped: {options.peer_python} is not there")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = [
            row
            for given in data_sets(options, folder)
            for row in compared(given, options.peer_python, folder / "runs" / given.name)
        ]
        peer = commands.peer(options.peer_python, folder / "versions", "versions")
        versions = json.loads(commands.printed(peer))
    report = {"benchmark": "compare_snapatac2", "compared": found, "peers": versions, **commands.conditions()}
    if options.save:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    raise SystemExit(1 if any(row["differ"] for row in found if row["set"] != "edges") else 0)


if __name__ == "__main__":
    main()
