"""The work of one sample, from its file to shards and obs, in the steps that Dask runs."""

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest.fragments import CountingRules, FragmentCounts, count_fragments
from annatac_scale.ingest.h5ad import n_cells_h5ad, open_h5ad, open_hdf5
from annatac_scale.ingest.kernel import PeakIndex, index_peaks
from annatac_scale.ingest.matrices import IslandCounts, PeakMatrix, count_islands
from annatac_scale.ingest.peaks import PeakSet, read_bed
from annatac_scale.ingest.provenance import fingerprint, now, versions
from annatac_scale.ingest.quality import fragment_quality, matrix_quality, with_given
from annatac_scale.ingest.sheet import SampleInput
from annatac_scale.ingest.tables import read_barcodes, some
from annatac_scale.ingest.tenx import (
    is_10x_folder,
    mtx_files,
    n_cells_10x_h5,
    n_cells_10x_mtx,
    open_10x_h5,
    open_10x_mtx,
)
from annatac_scale.progress import Progress
from annatac_scale.store.schema import SHARD_CELLS
from annatac_scale.store.writer import SampleWriter, create_store

FRAGMENTS, H5AD, TENX_H5, TENX_MTX = "fragments", "h5ad", "10x h5", "10x mtx"

_HDF5 = b"\x89HDF\r\n\x1a\n"
_HDF5_NAMES = (".h5ad", ".h5", ".hdf5")

_ROWS_AT_ONCE = 1000
"""Counts of peaks take ten times the memory of open islands: a shard is read in parts."""


class StoppedError(Exception):
    """Another sample failed, or the user stopped the conversion."""


@dataclass(frozen=True, eq=False)
class FragmentPeaks:
    """A peak set, or the islands themselves, ready to count fragments over, and what became of its lines."""

    peaks: PeakSet
    index: PeakIndex
    record: dict[str, int]


@dataclass(frozen=True, eq=False)
class Target:
    """What all samples of a run share: where they go, how they are counted, and whom to tell."""

    store: Path
    assembly: Assembly
    space: IslandSpace
    counting: str
    min_fragments: int
    layer: str | None
    use_raw: bool
    progress: Progress
    open_things: ExitStack
    peaks_of: Callable[[Path | None], FragmentPeaks]
    advance: Callable[[int], None] = lambda _: None
    stopping: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def worked(self, n_bytes: int) -> None:
        """Report bytes of input that were worked through. Raises StoppedError when there is no point in going on."""
        if self.stopping.is_set():
            raise StoppedError
        self.advance(n_bytes)

    def begin(self, name: str, n_cells: int, *to_close: Callable[[], None]) -> "Begun":
        """Begin a sample in the store; what was opened for it is closed with it."""
        with self.lock:
            things = self.open_things.enter_context(ExitStack())
            for close in to_close:
                things.callback(close)
            # A conversion that made the store and came to nothing may have removed it meanwhile.
            create_store(self.store, self.space, self.counting)
            return Begun(things.enter_context(SampleWriter(self.store, name, n_cells)), things)

    def end(self, begun: "Begun") -> None:
        """Close what was opened for a sample."""
        with self.lock:
            begun.things.close()


@dataclass(frozen=True, eq=False)
class Begun:
    """A sample being written, and the files to be closed with it."""

    writer: SampleWriter
    things: ExitStack


@dataclass(frozen=True, eq=False)
class Written:
    """A sample whose shards are written: what is left is to commit it."""

    begun: Begun
    obs: pd.DataFrame
    measured: NDArray[np.bool_]
    conversion: dict[str, Any]


def kind_of(path: Path) -> str:
    """What an input is, told by its content. Raises InputError for a folder or HDF5 file of no known layout."""
    if path.is_dir():
        if is_10x_folder(path):
            return TENX_MTX
        raise InputError(
            f"{path}: found a folder without matrix.mtx or matrix.mtx.gz; expected a 10x mtx folder, or "
            "a file; give the folder that holds the matrix"
        )
    try:
        with open(path, "rb") as file:
            is_hdf5 = file.read(len(_HDF5)) == _HDF5
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if not is_hdf5 and path.suffix.lower() not in _HDF5_NAMES:
        return FRAGMENTS
    with open_hdf5(path) as file:
        if "matrix" in file:
            return TENX_H5
        if "obs" in file and "var" in file:
            return H5AD
    raise InputError(
        f"{path}: found an HDF5 file without obs and var and without matrix; expected h5ad or 10x h5; "
        "give one of these"
    )


def files_of(sample: SampleInput, kind: str) -> dict[str, Path]:
    """The files that decide a sample's X, by role."""
    files = mtx_files(sample.path) if kind == TENX_MTX else {"data": sample.path}
    named = {"peaks": sample.peaks, "barcodes": sample.barcodes}
    return files | {role: path for role, path in named.items() if path is not None}


def options_of(sample: SampleInput, kind: str, target: Target) -> dict[str, Any]:
    """The options that decide a sample's X, beside its files and the store's own."""
    if kind == H5AD:
        return {"layer": target.layer, "use_raw": target.use_raw}
    if kind == FRAGMENTS and sample.barcodes is None:
        return {"min_fragments": target.min_fragments}
    return {}


def check_options(sample: SampleInput, kind: str, target: Target) -> None:
    """Raise InputError for options that do not go with a sample's kind, and for a list of barcodes that is none."""
    if kind != FRAGMENTS and sample.peaks is not None:
        raise InputError(
            f"{sample.path}: found a peak file for {kind}, which has peaks of its own; expected one for "
            "fragments only; leave out --peaks"
        )
    if kind != H5AD and (target.layer is not None or target.use_raw):
        raise InputError(
            f"{sample.path}: found --layer or --use-raw for {kind}; expected an h5ad; leave them out"
        )
    if kind != FRAGMENTS and target.counting != CountingRules.counting:
        raise InputError(
            f"{sample.path}: found --counting {target.counting} for {kind}, which is counted already; expected it for "
            "fragments only; leave it out, and convert fragments counted so into another --out"
        )
    if sample.barcodes is not None:
        read_barcodes(sample.barcodes)


def ignored_options(sample: SampleInput, kind: str, target: Target) -> list[str]:
    """Lines that tell which options that were given do not apply to a sample."""
    if target.min_fragments == CountingRules.min_fragments:
        return []
    if kind != FRAGMENTS:
        return [f"{sample.path.name}: a peak matrix: --min-fragments does not apply"]
    if sample.barcodes is not None:
        return [f"{sample.path.name}: --barcodes lists the cells: --min-fragments does not apply"]
    return []


def _open_matrix(sample: SampleInput, kind: str, target: Target) -> PeakMatrix:
    if kind == H5AD:
        return open_h5ad(sample.path, target.layer, target.use_raw)
    return open_10x_h5(sample.path) if kind == TENX_H5 else open_10x_mtx(sample.path)


def fragment_peaks(path: Path | None, assembly: Assembly, space: IslandSpace) -> FragmentPeaks:
    """The peaks of a BED file, or the islands where there is none."""
    if path is None:
        peaks = PeakSet.of_space(space)
        return FragmentPeaks(peaks, index_peaks(peaks, assembly), peaks.accounting())
    intervals, n_repeated = read_bed(path)
    peaks = PeakSet.of_intervals(intervals, assembly, space, path)
    return FragmentPeaks(peaks, index_peaks(peaks, assembly), peaks.accounting() | {"repeated": n_repeated})


def write_fragments(sample: SampleInput, target: Target) -> Written:
    """Count a fragment file and write its shards."""
    conversion = _conversion(sample, FRAGMENTS, target)
    source = target.peaks_of(sample.peaks)
    barcodes = None if sample.barcodes is None else read_barcodes(sample.barcodes)
    rules = CountingRules(target.counting, barcodes, target.min_fragments)
    counts = count_fragments(sample.path, target.assembly, source.peaks, source.index, rules, target.worked)
    _check_open(sample, counts.lines["counted"], target)
    begun = target.begin(sample.name, len(counts.barcodes))
    for shard, first in enumerate(range(0, len(counts.barcodes), SHARD_CELLS)):
        begun.writer.write_shard(shard, counts.open[first : first + SHARD_CELLS])
    _tell_fragments(sample, counts, source, target)
    record = {
        "peaks": source.record,
        "lines": counts.lines,
        "contigs": counts.contigs,
        "cells": {"cells": len(counts.barcodes), "without_fragments": int((counts.n_fragments == 0).sum())},
    }
    return Written(begun, fragment_quality(counts), source.peaks.measured, conversion | record)


def _check_open(sample: SampleInput, n_counts: int, target: Target) -> None:
    """Raise InputError where nothing at all was counted: such a sample could only be a mistake."""
    if not n_counts:
        raise InputError(
            f"{sample.path}: found no count of any cell in the {len(target.space):,} islands; expected some; "
            "check the assembly, or --select all"
        )


def _tell_fragments(
    sample: SampleInput, counts: FragmentCounts, source: FragmentPeaks, target: Target
) -> None:
    def say(line: str) -> None:
        target.progress.say(f"{sample.name}: {line}")

    lines, contigs, assembly = counts.lines, counts.contigs, target.assembly
    say(
        f"{len(counts.barcodes):,} cells; {lines['lines']:,} lines: {lines['counted']:,} counted, "
        f"{lines['outside_islands']:,} outside islands, {lines['not_a_cell']:,} of no cell, "
        f"{lines['other_contig']:,} on other contigs, {lines['comment']:,} comments"
    )
    if contigs["renamed"]:
        say(f"contigs read as the assembly's: {_pairs(contigs['renamed'])}")
    if contigs["other"]:
        say(f"{contigs['n_other']} contigs are not in {assembly.name}: {some(list(contigs['other']))}")
    if sample.peaks is None:
        cost = (
            "" if target.space.selection == "tss" else "; --peaks would keep the store and the models smaller"
        )
        say(f"no peak set: each of the {len(target.space):,} islands counts as one peak{cost}")
    else:
        _tell_peaks(source.record, say)
        chroms = np.unique(source.peaks.chrom[source.peaks.island >= 0]).tolist()
        silent = [
            name for name in (assembly.chromosomes[i] for i in chroms) if name not in counts.chromosomes
        ]
        if silent:
            say(f"no fragment lies on {some(silent)}, where {sample.peaks} has peaks")
    n_empty = int((counts.n_fragments == 0).sum())
    if n_empty:
        say(f"{n_empty:,} listed barcodes have no fragment: their rows are all closed")


def _pairs(names: Mapping[str, str]) -> str:
    shown = [f"{name} as {meant}" for name, meant in names.items()]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")


def _tell_peaks(record: Mapping[str, int], say: Callable[[str], None]) -> None:
    repeated = f", {record['repeated']:,} repeat another" if record.get("repeated") else ""
    say(
        f"{record['peaks']:,} peaks: {record['in_islands']:,} in {record['measured_islands']:,} islands, "
        f"{record['outside_islands']:,} outside islands, {record['other_contig']:,} on other contigs{repeated}"
    )


@dataclass(frozen=True, eq=False)
class OpenedMatrix:
    """A matrix being converted: its file, its peaks, and the file's row of each cell (-1: not there)."""

    sample: SampleInput
    kind: str
    matrix: PeakMatrix
    peaks: PeakSet
    barcodes: pd.Index
    rows: NDArray[np.int64]
    begun: Begun
    conversion: dict[str, Any]


def n_cells_of_matrix(sample: SampleInput, kind: str) -> int:
    """How many rows a matrix will have in the store, without opening all of it."""
    if sample.barcodes is not None:
        return len(read_barcodes(sample.barcodes))
    return {H5AD: n_cells_h5ad, TENX_H5: n_cells_10x_h5, TENX_MTX: n_cells_10x_mtx}[kind](sample.path)


def begin_matrix(sample: SampleInput, kind: str, target: Target) -> OpenedMatrix:
    """Open a matrix and begin its sample in the store."""
    conversion = _conversion(sample, kind, target)
    matrix = _open_matrix(sample, kind, target)
    try:
        peaks = PeakSet.of_intervals(matrix.intervals, target.assembly, target.space, sample.path)
        barcodes, rows = _rows_of_cells(sample, matrix)
        begun = target.begin(sample.name, len(rows), matrix.close)
    except BaseException:
        matrix.close()
        raise
    if matrix.note:
        target.progress.say(f"{sample.name}: {matrix.note}")
    return OpenedMatrix(sample, kind, matrix, peaks, barcodes, rows, begun, conversion)


def _rows_of_cells(sample: SampleInput, matrix: PeakMatrix) -> tuple[pd.Index, NDArray[np.int64]]:
    """Barcodes of the cells, and the row of each in the file, -1 for a listed barcode that it does not have."""
    if sample.barcodes is None:
        return matrix.obs.index, np.arange(len(matrix))
    barcodes = pd.Index(read_barcodes(sample.barcodes), dtype=object)
    rows = matrix.obs.index.get_indexer(barcodes).astype(np.int64)
    if (rows < 0).all():
        raise InputError(
            f"{sample.barcodes}: found barcodes such as {some(list(barcodes))} and none of {sample.path}; "
            f"expected barcodes such as {some(list(matrix.obs.index))}; give the list of this sample"
        )
    return barcodes, rows


def write_rows(opened: OpenedMatrix, shard: int, target: Target) -> pd.DataFrame:
    """Write one shard of a matrix; returns the quality of its cells."""
    cells = slice(shard * SHARD_CELLS, (shard + 1) * SHARD_CELLS)
    rows = opened.rows[cells]
    parts = []
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        some_rows = rows[first : first + _ROWS_AT_ONCE]
        parts.append(count_islands(opened.matrix.counts(some_rows), opened.peaks))
        target.worked(bytes_of(opened.sample, opened.kind) * len(some_rows) // len(opened.rows))
    counted = IslandCounts.concatenate(parts)
    opened.begun.writer.write_shard(shard, counted.open)
    return matrix_quality(opened.barcodes[cells], counted.n_counts, counted.open.n_open, counted.n_inside)


def bytes_of(sample: SampleInput, kind: str) -> int:
    """Size of a sample's data."""
    files = mtx_files(sample.path) if kind == TENX_MTX else {"data": sample.path}
    return sum(path.stat().st_size for path in files.values())


def finish_matrix(opened: OpenedMatrix, quality: list[pd.DataFrame], target: Target) -> Written:
    """Put the shards' cells together."""
    sample, matrix, peaks = opened.sample, opened.matrix, opened.peaks.accounting()
    n_cells, absent = len(opened.rows), int((opened.rows < 0).sum())
    cells = pd.concat(quality)
    _check_open(sample, int(cells["n_open"].sum()), target)
    not_listed = len(matrix) - (n_cells - absent)

    def say(line: str) -> None:
        target.progress.say(f"{sample.name}: {line}")

    say(f"{n_cells:,} cells")
    _tell_peaks(peaks, say)
    if sample.barcodes is not None:
        say(
            f"{not_listed:,} cells are not listed and left out; {absent:,} listed barcodes are not in the file: "
            "their rows are all closed"
        )
    record = {"peaks": peaks, "cells": {"cells": n_cells, "not_listed": not_listed, "not_in_file": absent}}
    obs = with_given(cells, matrix.obs.reindex(opened.barcodes))
    return Written(opened.begun, obs, opened.peaks.measured, opened.conversion | record)


def _conversion(sample: SampleInput, kind: str, target: Target) -> dict[str, Any]:
    """The record of a sample as far as it is known before the work, so that a file changed meanwhile is noticed."""
    return {
        "kind": kind,
        "inputs": fingerprint(files_of(sample, kind)),
        "options": options_of(sample, kind, target),
        "counting": target.counting,
        "assembly": target.assembly.name,
        "versions": versions(),
        "started": now(),
    }
