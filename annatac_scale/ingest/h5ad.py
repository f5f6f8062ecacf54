"""Peak matrices from h5ad files: X, a layer or raw; CSR and dense by rows from the file, CSC by loading it whole."""

import threading
from collections.abc import Callable

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from numpy.typing import NDArray
from scipy import sparse

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import Path, shown
from annatac_scale.ingest.matrices import PeakMatrix, ReadRows, check_compressed, compressed_rows
from annatac_scale.ingest.peaks import Intervals, parse_names

_CHROM = ("chrom", "chr", "seqnames", "chromosome")
_START = ("start", "chromstart")
_END = ("end", "chromend")
_FEATURE_TYPE = ("feature_types", "feature_type")

_NO_COORDINATES = "name the peaks like that, or give var the columns chrom, start and end"


def open_h5ad(path: Path, layer: str | None = None, use_raw: bool = False) -> PeakMatrix:
    """Open X, the layer ``layer``, or raw.X of an h5ad file.

    Peaks come from the var columns chrom, start and end, else from the var names; of several feature types only
    "Peaks" count. Raises InputError where the file is damaged, the matrix is missing or peaks have no coordinates.
    """
    if layer is not None and use_raw:
        raise InputError(
            f"{path}: found both a layer and raw asked for; expected one; leave out --layer or --use-raw"
        )
    file = open_hdf5(path)
    try:
        place = _place(path, file, layer, use_raw)
        obs = _frame(path, file, "obs")
        var = _frame(path, file, place.replace("X", "var") if use_raw else "var")
        read_rows, note = _reader(path, file[place], place, (len(obs), len(var)))
        columns = _peak_columns(var)
        layers = ", ".join(file.get("layers", ())) or "none"
        return PeakMatrix(
            path,
            "h5ad",
            place,
            obs.set_axis(obs.index.astype(str)),
            _intervals(path, var.iloc[columns]),
            columns,
            len(var),
            read_rows,
            file.close,
            note,
            f"give raw counts with --layer (there are: {layers}) or --use-raw",
        )
    except BaseException:
        file.close()
        raise


def n_cells_h5ad(path: Path) -> int:
    """Rows of obs."""
    with open_hdf5(path) as file:
        return len(_frame(path, file, "obs"))


def open_hdf5(path: Path) -> h5py.File:
    """An HDF5 file opened for reading; InputError where it is damaged or none."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read as HDF5 ({error}); expected a whole h5ad or 10x h5 file; "
            "check the path, or copy the file again"
        ) from error


def _place(path: Path, file: h5py.File, layer: str | None, use_raw: bool) -> str:
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


def _frame(path: Path, file: h5py.File, name: str) -> pd.DataFrame:
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


def _reader(
    path: Path, matrix: h5py.Group | h5py.Dataset, place: str, shape: tuple[int, int]
) -> tuple[ReadRows, str]:
    """How rows of the matrix are read, and what to tell the user about it."""
    attributes = matrix.attrs
    found = tuple(attributes.get("shape", attributes.get("h5sparse_shape", getattr(matrix, "shape", ()))))
    if found != shape:
        raise InputError(
            f"{path}: found {place} of shape {'x'.join(map(str, found))} beside {shape[0]} rows of obs "
            f"and {shape[1]} of var; expected them to agree; write the file again"
        )
    if isinstance(matrix, h5py.Dataset):
        return lambda a, b: sparse.csr_matrix(matrix[a:b]), ""
    encoding = str(attributes.get("encoding-type", attributes.get("h5sparse_format", "")))
    if encoding.startswith("csr"):
        indptr = matrix["indptr"][:].astype(np.int64)
        check_compressed(path, place, indptr, shape[0], len(matrix["data"]))
        return csr_rows(matrix, indptr, shape[1]), ""
    if encoding.startswith("csc"):
        indptr = matrix["indptr"][:].astype(np.int64)
        check_compressed(path, place, indptr, shape[1], len(matrix["data"]))
        note = f"{place} is stored by peaks (CSC): it is loaded whole and transposed, which takes memory"
        return loaded_rows(lambda: _transposed(matrix, indptr, shape)), note
    raise InputError(
        f"{path}: found {place} stored as {shown(encoding)}; expected csr_matrix, csc_matrix or a dense "
        "array; write the file again with anndata"
    )


def csr_rows(group: h5py.Group, indptr: NDArray[np.int64], n_columns: int) -> ReadRows:
    """Rows of a CSR matrix straight from the datasets ``data`` and ``indices`` of an HDF5 group."""

    def read(a: int, b: int) -> sparse.csr_matrix:
        part = slice(int(indptr[a]), int(indptr[b]))
        return compressed_rows(group["data"][part], group["indices"][part], indptr[a : b + 1], n_columns)

    return read


def loaded_rows(load: Callable[[], sparse.csr_matrix]) -> ReadRows:
    """Rows of a matrix that is loaded whole when the first of them is asked for."""
    lock = threading.Lock()
    loaded: list[sparse.csr_matrix] = []

    def read(a: int, b: int) -> sparse.csr_matrix:
        with lock:
            if not loaded:
                loaded.append(load())
        return loaded[0][a:b]

    return read


def _transposed(matrix: h5py.Group, indptr: NDArray[np.int64], shape: tuple[int, int]) -> sparse.csr_matrix:
    by_peaks = compressed_rows(matrix["data"][:], matrix["indices"][:], indptr, shape[0])
    return sparse.csr_matrix(by_peaks.T)


def _peak_columns(var: pd.DataFrame) -> NDArray[np.int64]:
    """The columns that are peaks: all, or of several feature types those of type Peaks."""
    column = _column(var, _FEATURE_TYPE)
    peaks = var[column].astype(str) == "Peaks" if column is not None else pd.Series(False, var.index)
    return np.flatnonzero(peaks) if peaks.any() else np.arange(len(var))


def _column(frame: pd.DataFrame, names: tuple[str, ...]) -> str | None:
    """The first of ``names`` that is a column, whatever its case."""
    by_lower = {str(column).lower(): str(column) for column in frame.columns}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _intervals(path: Path, var: pd.DataFrame) -> Intervals:
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
