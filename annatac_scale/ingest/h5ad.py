"""Peak matrices from h5ad files: X, a layer or raw, as CSR, CSC or dense, in bounded memory."""

from collections.abc import Iterator
from functools import cache

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import shown
from annatac_scale.ingest.blob_file import BlobFile
from annatac_scale.ingest.chunks import read_part
from annatac_scale.ingest.matrices import (
    PeakMatrix,
    ReadRows,
    check_compressed,
    compressed_rows,
    peaks_of_columns,
)
from annatac_scale.ingest.peaks import Intervals, parse_names
from annatac_scale.ingest.transpose import Entries, Transposition
from annatac_scale.store.elements import read_elem
from annatac_scale.store.place import Location, Place, blob_of, is_url

_CHROM = ("chrom", "chr", "seqnames", "chromosome")
_START = ("start", "chromstart")
_END = ("end", "chromend")
_FEATURE_TYPE = ("feature_types", "feature_type")

_CHUNK_CACHE = 16 << 20
"""Bytes of HDF5 chunks kept of each array, so that one across which rows are cut is read once."""
_AT_ONCE = 1 << 20
_DENSE_BYTES = 32 << 20
"""What is read in one go: entries of a CSC matrix, bytes of a dense one."""

_NO_COORDINATES = "name the peaks like that, or give var the columns chrom, start and end"


def open_h5ad(
    path: Location, layer: str | None = None, use_raw: bool = False, scratch: Place | None = None
) -> PeakMatrix:
    """Open X, the layer ``layer``, or raw.X of an h5ad file.

    Peaks come from the var columns chrom, start and end, else from the var names; of several feature types only
    "Peaks" count. scratch: where a CSC matrix is put in the order of cells.
    Raises InputError where the file is damaged or the matrix is missing.
    """
    if layer is not None and use_raw:
        raise InputError(
            f"{path}: found both a layer and raw asked for; expected one; leave out --layer or --use-raw"
        )
    file = open_hdf5(path)
    try:
        return _open(path, file, _place(path, file, layer, use_raw), use_raw, scratch)
    except BaseException:
        file.close()
        raise


def _open(path: Location, file: h5py.File, place: str, use_raw: bool, scratch: Place | None) -> PeakMatrix:
    var_place = place.replace("X", "var") if use_raw else "var"
    stored, shape = file[place], (_n_rows(path, file, "obs"), _n_rows(path, file, var_place))
    encoding = _encoding(path, stored, place, shape)
    read_var = cache(lambda: _frame(path, file, var_place))
    columns = _peak_columns(read_var()) if _has_types(file[var_place]) else np.arange(shape[1])
    layers = ", ".join(file.get("layers", ())) or "none"
    transposition, row_step = None, 1
    if encoding == "csc":

        def fill(entries: Entries) -> Iterator[int]:
            return _csc_entries(stored, matrix, peaks_of_columns(columns, shape[1]), entries)

        transposition = Transposition(
            fill, shape[0], len(columns), len(stored["data"]), "stored by peaks (CSC)", scratch
        )
        read_rows: ReadRows = transposition.rows
    elif encoding == "csr":
        read_rows = csr_rows(stored, shape[1])
    else:
        read_rows, row_step = dense_rows(stored), stored.chunks[0] if stored.chunks else 1
    matrix = PeakMatrix(
        path=path,
        kind="h5ad",
        place=place,
        n_cells=shape[0],
        columns=columns if transposition is None else np.arange(len(columns)),
        n_columns=shape[1] if transposition is None else len(columns),
        read_rows=read_rows,
        read_obs=lambda: _obs(path, file),
        read_intervals=lambda: _intervals(path, read_var().iloc[columns]),
        close=file.close,
        remedy=f"give raw counts with --layer (there are: {layers}) or --use-raw",
        row_step=row_step,
        transposition=transposition,
    )
    matrix.check_type(stored.dtype if encoding == "dense" else stored["data"].dtype)
    return matrix


def _obs(path: Location, file: h5py.File) -> pd.DataFrame:
    obs = _frame(path, file, "obs")
    return obs.set_axis(obs.index.astype(str))


def n_cells_h5ad(path: Location) -> int:
    """Rows of obs."""
    with open_hdf5(path) as file:
        return _n_rows(path, file, "obs")


def open_hdf5(path: Location) -> h5py.File:
    """An HDF5 file, on disk or in object storage, opened for reading; InputError where it is damaged or none."""
    source = BlobFile(blob_of(path)) if is_url(path) else path
    try:
        return h5py.File(source, "r", rdcc_nbytes=_CHUNK_CACHE)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read as HDF5 ({error}); expected a whole h5ad or 10x h5 file; "
            "check the path, or copy the file again"
        ) from error


def _place(path: Location, file: h5py.File, layer: str | None, use_raw: bool) -> str:
    """Where in the file the asked-for matrix is."""
    wanted = ("raw/X", "raw.X") if use_raw else ("X",) if layer is None else (f"layers/{layer}",)
    for place in wanted:
        if place in file:
            return place
    layers = ", ".join(file.get("layers", ())) or "none"
    raw = "there is raw" if "raw/X" in file or "raw.X" in file else "there is no raw"
    raise InputError(
        f"{path}: found no {wanted[0]}; expected the matrix there; choose with --layer (there are: "
        f"{layers}) or --use-raw ({raw})"
    )


def _frame(path: Location, file: h5py.File, name: str) -> pd.DataFrame:
    try:
        frame = read_elem(file[name])
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: {name} cannot be read ({error}); expected a whole h5ad file; copy or write it again"
        ) from error
    if not isinstance(frame, pd.DataFrame):
        raise InputError(
            f"{path}: found {name} in the layout of anndata before 0.7; expected a data frame; open the "
            "file with anndata and write it again"
        )
    return frame


def _n_rows(path: Location, file: h5py.File, name: str) -> int:
    """Rows of a data frame, without reading it where its index is a plain array."""
    index = file[name].attrs.get("_index", "") if name in file else ""
    found = file[name].get(index) if index and isinstance(file[name], h5py.Group) else None
    return len(found) if isinstance(found, h5py.Dataset) else len(_frame(path, file, name))


def _encoding(path: Location, matrix: h5py.Group | h5py.Dataset, place: str, shape: tuple[int, int]) -> str:
    """ "csr", "csc" or "dense", after a look at whether the matrix is whole."""
    attributes = matrix.attrs
    found = tuple(attributes.get("shape", attributes.get("h5sparse_shape", getattr(matrix, "shape", ()))))
    if found != shape:
        raise InputError(
            f"{path}: found {place} of shape {'x'.join(map(str, found))} beside {shape[0]} rows of obs "
            f"and {shape[1]} of var; expected them to agree; write the file again"
        )
    if isinstance(matrix, h5py.Dataset):
        return "dense"
    encoding = str(attributes.get("encoding-type", attributes.get("h5sparse_format", "")))[:3]
    if encoding not in ("csr", "csc"):
        raise InputError(
            f"{path}: found {place} stored as {shown(encoding)}; expected csr_matrix, csc_matrix or a dense "
            "array; write the file again with anndata"
        )
    check_compressed(path, place, matrix, shape[encoding == "csc"])
    return encoding


def csr_rows(group: h5py.Group, n_columns: int) -> ReadRows:
    """Rows of a CSR matrix straight from the datasets of an HDF5 group; only the part of indptr is read, too."""

    def read(a: int, b: int) -> sparse.csr_matrix:
        indptr = group["indptr"][a : b + 1].astype(np.int64)
        part = slice(int(indptr[0]), int(indptr[-1]))
        if part.start < 0 or part.stop > len(group["data"]) or (np.diff(indptr) < 0).any():
            raise ValueError(f"an indptr that does not divide its {len(group['data']):,} values into rows")
        data, indices = (read_part(group[name], part.start, part.stop) for name in ("data", "indices"))
        return compressed_rows(data, indices, indptr - part.start, n_columns)

    return read


def dense_rows(dataset: h5py.Dataset) -> ReadRows:
    """Rows of a dense matrix, whole chunks at a time."""
    n_columns, step = dataset.shape[1], dataset.chunks[1] if dataset.chunks else 1

    def read(a: int, b: int) -> sparse.csr_matrix:
        width = max(1, _DENSE_BYTES // ((b - a) * dataset.dtype.itemsize * step)) * step
        starts = range(0, n_columns, width)
        return sparse.hstack(
            [sparse.csr_matrix(dataset[a:b, first : first + width]) for first in starts], format="csr"
        )

    return read


def _csc_entries(
    group: h5py.Group, matrix: PeakMatrix, numbers: NDArray[np.int32] | None, entries: Entries
) -> Iterator[int]:
    """Fill ``entries`` from a CSC matrix of cells x peaks, as transpose.Fill; numbers: as peaks_of_columns."""
    indptr = group["indptr"][:].astype(np.int64)
    if (np.diff(indptr) < 0).any():
        raise ValueError(f"an indptr that does not divide its {len(group['data']):,} values into columns")
    if numbers is None:
        numbers = np.arange(len(indptr) - 1, dtype=np.int32)
    at, n = 0, 0
    while at < indptr[-1]:
        stop = min(at + _AT_ONCE, at + len(entries.rows) - n, int(indptr[-1]))
        cells, values = (read_part(group[name], at, stop) for name in ("indices", "data"))
        if cells.min() < 0 or cells.max() >= matrix.n_cells:
            raise ValueError(f"a row index outside 0..{matrix.n_cells - 1}")
        first = int(np.searchsorted(indptr, at, side="right")) - 1
        last = int(np.searchsorted(indptr, stop, side="left"))
        peaks = np.repeat(numbers[first:last], np.diff(np.clip(indptr[first : last + 1], at, stop)))
        kept = peaks >= 0
        if not kept.all():
            cells, values, peaks = cells[kept], values[kept], peaks[kept]
        bad = matrix.first_bad(values)
        if bad is not None:
            raise matrix.no_count(values[bad], int(cells[bad]), int(peaks[bad]))
        part = entries.part(n, n + len(peaks))
        part.rows[:], part.peaks[:], part.counts[:] = cells, peaks, values
        at, n = stop, n + len(peaks)
        if n == len(entries.rows):
            yield n
            n = 0
    if n:
        yield n


def _has_types(var: h5py.Group) -> bool:
    return any(str(name).lower() in _FEATURE_TYPE for name in var)


def _peak_columns(var: pd.DataFrame) -> NDArray[np.int64]:
    """The columns that are peaks: all, or of several feature types those of type Peaks."""
    column = _column(var, _FEATURE_TYPE)
    peaks = var[column].astype(str) == "Peaks" if column is not None else pd.Series(False, var.index)
    return np.flatnonzero(peaks) if peaks.any() else np.arange(len(var))


def _column(frame: pd.DataFrame, names: tuple[str, ...]) -> str | None:
    """The first of ``names`` that is a column, whatever its case."""
    by_lower = {str(column).lower(): str(column) for column in frame.columns}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _intervals(path: Location, var: pd.DataFrame) -> Intervals:
    chrom, start, end = _column(var, _CHROM), _column(var, _START), _column(var, _END)
    if chrom is None or start is None or end is None:
        return parse_names([str(name) for name in var.index], f"{path}, var", _NO_COORDINATES)
    positions = var[[start, end]].apply(pd.to_numeric, errors="coerce")
    bad = ~((positions[start] >= 0) & (positions[start] < positions[end]) & (positions % 1 == 0).all(axis=1))
    bad |= var[chrom].isna()
    if bad.any():
        row = var[bad.to_numpy()].iloc[0]
        raise InputError(
            f"{path}, var {shown(str(row.name))}: found {chrom} {row[chrom]}, {start} {row[start]}, "
            f"{end} {row[end]}; expected a contig and whole numbers 0 <= start < end; mend var"
        )
    return Intervals(
        var[chrom].astype(str).to_numpy(object),
        positions[start].to_numpy(np.int64),
        positions[end].to_numpy(np.int64),
    )
