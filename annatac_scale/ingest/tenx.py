"""Peak matrices as Cell Ranger writes them: feature-barcode h5 files and mtx folders."""

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path as FilePath

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import complaint, read_lines, shown, whole_number
from annatac_scale.ingest.bgzf import BrokenTextError
from annatac_scale.ingest.h5ad import csr_rows, open_hdf5
from annatac_scale.ingest.local_copy import local_copy
from annatac_scale.ingest.market import market_entries, read_market, texts
from annatac_scale.ingest.matrices import PeakMatrix, check_compressed, peaks_of_columns
from annatac_scale.ingest.peaks import Intervals, as_intervals, parse_names
from annatac_scale.ingest.transpose import Entries, Transposition
from annatac_scale.store.place import Location, Place, joined, place_of

PEAKS = "Peaks"

_NAMES_REMEDY = "give the matrix of a Cell Ranger ATAC or ARC run"


def open_10x_h5(path: Location) -> PeakMatrix:
    """Open a 10x feature-barcode h5; of a multiome file only the features of type Peaks.

    Raises InputError where the file is damaged, is of another layout or holds no peaks.
    """
    file = open_hdf5(path)
    try:
        group = file["matrix"]
        n_features, n_cells = (int(n) for n in group["shape"][:])
        features = group["features"]
        names = features["interval"] if "interval" in features else features["id"]
        _check_size(path, "matrix", (n_features, n_cells), (len(names), len(group["barcodes"])))
        columns = _peak_columns(path, _texts(features["feature_type"]))
        check_compressed(path, "matrix", group, n_cells)
        matrix = PeakMatrix(
            path=path,
            kind="10x h5",
            place="matrix",
            n_cells=n_cells,
            columns=columns,
            n_columns=n_features,
            read_rows=csr_rows(group, n_features),
            read_obs=lambda: _obs(_texts(group["barcodes"])),
            read_intervals=lambda: parse_names(_texts(names, columns), path, _NAMES_REMEDY),
            close=file.close,
        )
        matrix.check_type(group["data"].dtype)
    except (KeyError, OSError, ValueError) as error:
        file.close()
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: cannot be read as a 10x h5 file ({error}); expected the group matrix with barcodes, "
            "features, data, indices, indptr and shape; check the file"
        ) from error
    return matrix


def n_cells_10x_h5(path: Location) -> int:
    """Barcodes of a 10x h5."""
    with open_hdf5(path) as file:
        if "matrix/barcodes" not in file:
            raise InputError(f"{path}: found no matrix/barcodes; expected a 10x h5 file; check the file")
        return len(file["matrix/barcodes"])


def _texts(dataset: h5py.Dataset, which: NDArray[np.int64] | None = None) -> list[str]:
    """All texts of a dataset, or the given ones."""
    found = dataset[:] if which is None else dataset[:][which]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in found.tolist()]


def _obs(barcodes: list[str]) -> pd.DataFrame:
    return pd.DataFrame(index=pd.Index(barcodes, dtype=object, name="barcode"))


def _peak_columns(path: Location, types: list[str]) -> NDArray[np.int64]:
    columns = np.flatnonzero(np.array(types, object) == PEAKS)
    if not len(columns):
        some = ", ".join(sorted(set(types))[:3])
        raise InputError(
            f"{path}: found features of type {some}; expected some of type {PEAKS}; {_NAMES_REMEDY}"
        )
    return columns


def _check_size(path: Location, place: str, found: tuple[int, int], expected: tuple[int, int]) -> None:
    if found != expected:
        raise InputError(
            f"{path}: found {place} of {found[0]:,} features x {found[1]:,} barcodes beside "
            f"{expected[0]:,} features and {expected[1]:,} barcodes listed; expected as many; copy the files again"
        )


def is_10x_folder(path: Location) -> bool:
    """Whether ``path`` is a folder, or a prefix, with a matrix.mtx or matrix.mtx.gz."""
    return _member(path, "matrix.mtx") is not None


def mtx_files(path: Location) -> dict[str, Location]:
    """The three files of a 10x mtx folder by role: matrix, barcodes, features."""
    return {
        "matrix": _needed(path, "matrix.mtx"),
        "barcodes of the matrix": _needed(path, "barcodes.tsv"),
        "features of the matrix": _needed(path, "features.tsv", "peaks.bed"),
    }


def n_cells_10x_mtx(path: Location) -> int:
    """Columns of the matrix in a 10x mtx folder."""
    return read_market(_needed(path, "matrix.mtx")).n_columns


def open_10x_mtx(path: Location, scratch: Place | None = None) -> PeakMatrix:
    """Open a folder of matrix.mtx, barcodes.tsv and features.tsv or peaks.bed, each plain or gzip.

    scratch: where the matrix is put in the order of cells.
    Raises InputError for a missing or damaged file, and where their lengths do not agree.
    """
    matrix_file, barcodes_file, features = mtx_files(path).values()
    market = read_market(matrix_file)
    read_obs = cache(lambda: _obs(_barcodes(barcodes_file)))
    with local_copy(features) as file:
        columns, intervals, n_features = _mtx_features(file)
    _check_size(matrix_file, "a matrix", (market.n_rows, market.n_columns), (n_features, len(read_obs())))

    def fill(entries: Entries) -> Iterator[int]:
        numbers = peaks_of_columns(columns, n_features)
        return market_entries(
            market, numbers, lambda value, peak, cell, where: matrix.no_count(value, cell, peak, where)
        )(entries)

    transposition = Transposition(
        fill, market.n_columns, len(columns), market.n_entries, "text that may be in any order", scratch
    )
    matrix = PeakMatrix(
        path=path,
        kind="10x mtx",
        place=str(matrix_file).rpartition("/")[2],
        n_cells=market.n_columns,
        columns=np.arange(len(columns)),
        n_columns=len(columns),
        read_rows=transposition.rows,
        read_obs=read_obs,
        read_intervals=lambda: intervals,
        close=lambda: None,
        transposition=transposition,
    )
    return matrix


def _barcodes(path: Location) -> list[str]:
    with local_copy(path) as file:
        lines = [line.split("\t")[0].strip() for _, line in read_lines(file)]
    return [barcode for barcode in lines if barcode]


def _member(folder: Location, *names: str) -> Location | None:
    """The first of the named files, plain or gzip, that is in the folder."""
    place = place_of(folder)
    candidates = (name + end for name in names for end in ("", ".gz"))
    return next((joined(folder, name) for name in candidates if place.size(name) is not None), None)


def _needed(folder: Location, *names: str) -> Location:
    found = _member(folder, *names)
    if found is None:
        raise InputError(
            f"{folder}: found no {' or '.join(names)}, plain or .gz; expected a folder as Cell Ranger "
            "writes it; copy the folder again"
        )
    return found


def _mtx_features(path: FilePath) -> tuple[NDArray[np.int64], Intervals, int]:
    """The rows of the matrix that are peaks, their intervals, and how many rows there are."""
    plain = _plain_features(path)
    if plain is not None:
        return plain
    rows = [(number, line.rstrip("\r\n").split("\t")) for number, line in read_lines(path)]
    rows = [row for row in rows if any(row[1]) and not row[1][0].startswith("#")]
    if path.name.startswith("peaks.bed"):
        intervals = [_interval(path, number, fields[:3]) for number, fields in rows]
        return np.arange(len(rows)), as_intervals(intervals), len(rows)
    has_types = all(len(fields) >= 3 for _, fields in rows)
    columns = _peak_columns(path, [fields[2] for _, fields in rows]) if has_types else np.arange(len(rows))
    peaks = [rows[i] for i in columns.tolist()]
    if has_types and all(len(fields) >= 6 for _, fields in peaks):
        found = as_intervals([_interval(path, number, fields[3:6]) for number, fields in peaks])
    else:
        found = parse_names([fields[0] for _, fields in peaks], path, _NAMES_REMEDY)
    return columns, found, len(rows)


def _plain_features(path: FilePath) -> tuple[NDArray[np.int64], Intervals, int] | None:
    """The same by columns, of a file as Cell Ranger writes it; None for any other, right or wrong."""
    table, is_bed = _plain_table(path), path.name.startswith("peaks.bed")
    if table is None or (is_bed and table.num_columns < 3):
        return None
    n, columns = len(table), np.arange(len(table))
    if table.num_columns >= 3 and not is_bed:
        columns = _peak_columns(path, table["2"].to_pylist())
        table = table.take(columns)
    if not is_bed and table.num_columns < 6:
        return columns, parse_names(table["0"].to_pylist(), path, _NAMES_REMEDY), n
    intervals = _plain_intervals(table, 0 if is_bed else 3)
    return None if intervals is None else (columns, intervals, n)


def _plain_table(path: FilePath) -> pa.Table | None:
    """All fields of a file that has as many in each line and no comment, as texts; None for any other."""
    try:
        data = b"".join(texts(path))
        names = [str(i) for i in range(data[: data.find(b"\n")].count(b"\t") + 1)]
        table = csv.read_csv(
            io.BytesIO(data),
            csv.ReadOptions(column_names=names, use_threads=False),
            csv.ParseOptions(delimiter="\t", quote_char=False),
            csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except (BrokenTextError, ValueError):
        return None
    return None if pc.any(pc.starts_with(table["0"], "#")).as_py() else table


def _plain_intervals(table: pa.Table, first: int) -> Intervals | None:
    """Intervals from three columns from ``first`` on, None where not all are."""
    try:
        start, end = (pc.cast(table[str(first + i)], pa.int64()).to_numpy() for i in (1, 2))
    except ValueError:
        return None
    if ((start < 0) | (start >= end)).any():
        return None
    contigs = table[str(first)].combine_chunks().dictionary_encode()
    return Intervals(np.array(contigs.dictionary.to_pylist(), object)[contigs.indices.to_numpy()], start, end)


def _interval(path: FilePath, number: int, fields: list[str]) -> tuple[str, int, int]:
    start, end = (whole_number(field.strip()) for field in fields[1:]) if len(fields) == 3 else (None, None)
    if start is None or end is None or start >= end:
        raise complaint(
            path, number, shown("\t".join(fields)), "'chrom start end' with 0 <= start < end", _NAMES_REMEDY
        )
    return fields[0], start, end
