"""Writers of the matrix files that users bring: 10x h5, 10x mtx folders and h5ad in all layouts."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv
from scipy import sparse
from scipy.io import mmwrite

BARCODES = [f"AAAC{i:03d}-1" for i in range(30)]
PEAKS = [("chr1", i * 350, i * 350 + 400) for i in range(25)] + [
    ("chr2", i * 500, i * 500 + 90) for i in range(8)
]


def names(peaks: Sequence[tuple[str, int, int]], form: str = "{}:{}-{}") -> list[str]:
    return [form.format(*peak) for peak in peaks]


def some_counts(n_cells: int = 30, n_peaks: int = 33, seed: int = 0) -> sparse.csr_matrix:
    """Counts of 0 to 19, a tenth of them not 0."""
    rng = np.random.default_rng(seed)
    matrix = sparse.random(n_cells, n_peaks, 0.3, "csr", np.int64, rng)
    matrix.data = rng.integers(1, 20, matrix.nnz)
    return matrix


def some_anndata(matrix: Any = None) -> anndata.AnnData:
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(["B", "T", "NK"] * 10),
            "depth": np.arange(30) / 4,
            "n_counts": np.arange(30),
            "passed": [True, False] * 15,
            "donor": [f"D{i % 2}" for i in range(30)],
        },
        index=BARCODES,
    )
    matrix = some_counts() if matrix is None else matrix
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=names(PEAKS)))


def write_10x_h5(
    path: Path,
    matrix: sparse.csr_matrix,
    features: list[str],
    types: list[str] | None = None,
    interval: bool = False,
) -> Path:
    """A Cell Ranger feature-barcode matrix; columns of the CSC matrix features x barcodes are the cells."""
    matrix = sparse.csr_matrix(matrix)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(BARCODES[: matrix.shape[0]], "S")
        group["data"] = matrix.data.astype(np.int32)
        group["indices"] = matrix.indices.astype(np.int64)
        group["indptr"] = matrix.indptr.astype(np.int64)
        group["shape"] = np.array(matrix.shape[::-1], np.int32)
        table = group.create_group("features")
        table["id"] = np.array([f"id{i}" for i in range(len(features))] if interval else features, "S")
        table["feature_type"] = np.array(types or ["Peaks"] * len(features), "S")
        if interval:
            table["interval"] = np.array(features, "S")
    return path


def write_10x_mtx(
    folder: Path, matrix: sparse.csr_matrix, features: str, rows: list[str], zipped: bool = True
) -> Path:
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", sparse.coo_matrix(matrix.T.astype(np.int64)))
    (folder / "barcodes.tsv").write_text("".join(f"{barcode}\n" for barcode in BARCODES[: matrix.shape[0]]))
    (folder / features).write_text("".join(f"{row}\n" for row in rows))
    for file in list(folder.iterdir()) if zipped else []:
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    return folder


def random_counts(n_cells: int, n_peaks: int, n_open: int, seed: int = 0) -> sparse.csr_matrix:
    """Counts of 1 to 3 in ``n_open`` random peaks of each cell (fewer where one came twice), int32."""
    rng = np.random.default_rng(seed)
    peaks = rng.integers(0, n_peaks, n_cells * n_open, dtype=np.int32)
    counts = rng.integers(1, 4, n_cells * n_open, dtype=np.int32)
    matrix = sparse.csr_matrix(
        (counts, peaks, np.arange(0, n_cells * n_open + 1, n_open)), shape=(n_cells, n_peaks)
    )
    matrix.sum_duplicates()
    matrix.data[matrix.data > 3] = 3
    return matrix


def anndata_of(matrix: Any) -> anndata.AnnData:
    """With barcodes C0, C1 ... and peaks of 400 bp every 1,000 bp of chr1."""
    obs = pd.DataFrame(index=[f"C{i}" for i in range(matrix.shape[0])])
    var = pd.DataFrame(index=[f"chr1:{i * 1000}-{i * 1000 + 400}" for i in range(matrix.shape[1])])
    return anndata.AnnData(matrix, obs=obs, var=var)


def write_large_10x_mtx(folder: Path, matrix: sparse.csr_matrix) -> Path:
    """As anndata_of, the entries by cells."""
    folder.mkdir()
    (folder / "barcodes.tsv").write_text("".join(f"C{i}\n" for i in range(matrix.shape[0])))
    bed = (f"chr1\t{i * 1000}\t{i * 1000 + 400}\n" for i in range(matrix.shape[1]))
    (folder / "peaks.bed").write_text("".join(bed))
    entries = matrix.tocoo()
    table = pa.table({"peak": entries.col + 1, "cell": entries.row + 1, "count": entries.data})
    head = f"%%MatrixMarket matrix coordinate integer general\n{matrix.shape[1]} {matrix.shape[0]} {matrix.nnz}\n"
    with open(folder / "matrix.mtx", "wb") as file:
        file.write(head.encode())
        csv.write_csv(table, file, csv.WriteOptions(include_header=False, delimiter=" "))
    return folder
