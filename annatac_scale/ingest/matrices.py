"""Peak matrices: one interface for h5ad, 10x h5 and 10x mtx, and the way from counts of peaks to open islands.

The readers are h5ad.py and tenx.py; convert.py picks one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import Path, shown
from annatac_scale.ingest.peaks import Intervals, PeakSet, levels
from annatac_scale.store.open_islands import OpenIslands

_MAX_COUNT = 2**31 - 1

ReadRows = Callable[[int, int], sparse.csr_matrix]


@dataclass(frozen=True, eq=False)
class PeakMatrix:
    """A cells x peaks matrix in a file, read by rows.

    kind: "h5ad", "10x h5" or "10x mtx"; place: the part of the file that holds the values
    obs: one row a cell, indexed by barcode; intervals: its peaks
    columns: int64 [n_peaks], those of the file's ``n_columns`` that are the peaks
    read_rows: (a, b) -> rows a to b of the file's matrix as CSR of any number type; may be called from any thread
    note: what the user should know of how it is read, "" for nothing; remedy: where counts may be found instead
    """

    path: Path
    kind: str
    place: str
    obs: pd.DataFrame
    intervals: Intervals
    columns: NDArray[np.int64]
    n_columns: int
    read_rows: ReadRows
    close: Callable[[], None]
    note: str = ""
    remedy: str = "give raw counts"

    def __post_init__(self) -> None:
        if not len(self.obs) or not len(self.intervals):
            raise InputError(
                f"{self.path}: found {len(self.obs)} cells x {len(self.intervals)} peaks; expected at least one "
                "of each; check the file"
            )
        if not self.obs.index.is_unique:
            i = int(np.flatnonzero(self.obs.index.duplicated())[0])
            raise InputError(
                f"{self.path}: found barcode {shown(str(self.obs.index[i]))} again in row {i + 1}; "
                "expected each barcode once; make them unique, or give each sample as a file of its own"
            )
        again = self.intervals.first_duplicate()
        if again is not None:
            raise InputError(
                f"{self.path}: found peak {self.intervals.name(again)} again as peak {again + 1}; "
                "expected each peak once; merge the two"
            )

    def __len__(self) -> int:
        return len(self.obs)

    @cached_property
    def _peak_of_column(self) -> NDArray[np.int64]:
        """The peak of each column of the file's matrix, -1 for columns that are none."""
        peak = np.full(self.n_columns, -1, np.int64)
        peak[self.columns] = np.arange(len(self.columns))
        return peak

    def counts(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """int64 [len(rows), n_peaks]: the counts of some rows in the given order; row -1 is all zeros.

        Raises InputError naming barcode, peak and value for anything but a whole number from 0 to 2^31 - 1.
        """
        wanted = np.unique(rows[rows >= 0])
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1) if len(wanted) else []
        found = [self._checked(int(run[0]), int(run[-1]) + 1) for run in runs]
        empty = sparse.csr_matrix((1, len(self.columns)), dtype=np.int64)
        stacked = sparse.vstack([*found, empty], format="csr", dtype=np.int64)
        return stacked[np.where(rows >= 0, np.searchsorted(wanted, rows), len(wanted))]

    def _checked(self, a: int, b: int) -> sparse.csr_matrix:
        """Rows a to b as counts of the peaks."""
        try:
            read = self.read_rows(a, b)
        except (OSError, EOFError, KeyError, RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.path}: {self.place} cannot be read ({error}); expected a whole {self.kind} file; "
                "copy or make it again"
            ) from error
        peak = self._peak_of_column[read.indices]
        kept = peak >= 0
        row = np.repeat(np.arange(b - a), np.diff(read.indptr))[kept]
        peak, values = peak[kept], read.data[kept]
        self._check(values, a + row, peak)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=b - a))])
        return sparse.csr_matrix((values.astype(np.int64), peak, indptr), shape=(b - a, len(self.columns)))

    def _check(self, values: NDArray[Any], row: NDArray[np.int64], peak: NDArray[np.int64]) -> None:
        if values.dtype.kind == "b":
            return
        if values.dtype.kind not in "iuf":
            raise InputError(
                f"{self.path}: found values of type {values.dtype} in {self.place}; "
                f"expected counts; {self.remedy}"
            )
        with np.errstate(invalid="ignore"):
            whole = values == np.rint(values) if values.dtype.kind == "f" else np.ones(len(values), bool)
            bad = ~(whole & (values >= 0) & (values <= _MAX_COUNT))
        if not bad.any():
            return
        i = int(np.flatnonzero(bad)[0])
        value, looks = float(values[i]), ""
        if np.isfinite(value) and value > 0 and not whole[i]:
            looks = ", which looks normalised or log-transformed"
        barcode, name = shown(str(self.obs.index[row[i]])), self.intervals.name(int(peak[i]))
        raise InputError(
            f"{self.path}: found {value:g} in {self.place} for barcode {barcode}, peak {name}{looks}; "
            f"expected counts, whole numbers from 0 on; {self.remedy}"
        )


@dataclass(frozen=True, eq=False)
class IslandCounts:
    """Some cells over the islands; n_counts and n_inside, int64 [n], are their counts in all peaks and in islands."""

    open: OpenIslands
    n_counts: NDArray[np.int64]
    n_inside: NDArray[np.int64]

    @classmethod
    def concatenate(cls, parts: Sequence["IslandCounts"]) -> "IslandCounts":
        """The cells of all parts, in order."""
        return cls(
            OpenIslands.concatenate([part.open for part in parts]),
            np.concatenate([part.n_counts for part in parts]),
            np.concatenate([part.n_inside for part in parts]),
        )


def count_islands(counts: sparse.csr_matrix, peaks: PeakSet) -> IslandCounts:
    """Add up int64 counts [n, n_peaks] per island and turn them into levels."""
    inside = peaks.island[counts.indices] >= 0
    before = np.concatenate([[0], np.cumsum(inside)])
    sums = sparse.csr_matrix(
        (counts.data[inside], peaks.island[counts.indices[inside]], before[counts.indptr]),
        shape=(counts.shape[0], len(peaks.n)),
    )
    sums.sum_duplicates()
    sums.eliminate_zeros()
    opened = OpenIslands(
        sums.indptr.astype(np.int64), sums.indices.astype(np.int32), levels(sums.data, peaks.n[sums.indices])
    )
    return IslandCounts(opened, _row_sums(counts), _row_sums(sums))


def _row_sums(matrix: sparse.csr_matrix) -> NDArray[np.int64]:
    # matrix.sum(axis=1) would give the deprecated np.matrix.
    total = np.concatenate([[0], np.cumsum(matrix.data)])
    return np.diff(total[matrix.indptr]).astype(np.int64)


def check_compressed(path: Path, place: str, indptr: NDArray[np.int64], n_rows: int, n_values: int) -> None:
    """Raise InputError unless ``indptr`` divides ``n_values`` values into ``n_rows`` rows."""
    sound = (
        len(indptr) == n_rows + 1
        and indptr[0] == 0
        and indptr[-1] == n_values
        and (np.diff(indptr) >= 0).all()
    )
    if not sound:
        raise InputError(
            f"{path}: found an indptr in {place} that does not divide {n_values:,} values into {n_rows:,} "
            "rows; expected a whole sparse matrix; copy or make the file again"
        )


def compressed_rows(
    data: NDArray[np.generic], indices: NDArray[np.integer], indptr: NDArray[np.int64], n_columns: int
) -> sparse.csr_matrix:
    """CSR from the three arrays of some rows; ValueError for an index outside the columns."""
    if len(indices) and (indices.min() < 0 or indices.max() >= n_columns):
        raise ValueError(f"a column index outside 0..{n_columns - 1}")
    return sparse.csr_matrix(
        (data, indices.astype(np.int64), indptr - indptr[0]), shape=(len(indptr) - 1, n_columns)
    )
