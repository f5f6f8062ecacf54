"""Peak matrices: one interface for h5ad, 10x h5 and 10x mtx, and the way from counts of peaks to open islands.

The readers are h5ad.py and tenx.py; open_matrix.py picks one. Matrices that are stored by peaks are put in the order of
cells first, out of core: transpose.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import shown
from annatac_scale.ingest.peaks import Intervals, PeakSet, levels
from annatac_scale.ingest.transpose import MEMORY_BYTES, Transposition
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Location

_MAX_COUNT = 2**31 - 1
_ROWS_AT_ONCE = 1000

ReadRows = Callable[[int, int], sparse.csr_matrix]


@dataclass(frozen=True, eq=False)
class PeakMatrix:
    """A cells x peaks matrix in a file, read by rows. Opening it reads neither values nor obs.

    kind: "h5ad", "10x h5" or "10x mtx"; place: the part of the file that holds the values
    columns: int64 [n_peaks], those of the file's ``n_columns`` that are the peaks
    read_rows: (a, b) -> rows a to b of the file's matrix as CSR of any number type; entries that come twice add up;
    may be called from any thread
    read_obs, read_intervals: the file's table of cells, indexed by barcode, and its peaks
    remedy: where counts may be found instead; row_step: rows that the file keeps together
    transposition: how the values get in the order of cells, None where they are
    """

    path: Location
    kind: str
    place: str
    n_cells: int
    columns: NDArray[np.int64]
    n_columns: int
    read_rows: ReadRows
    read_obs: Callable[[], pd.DataFrame]
    read_intervals: Callable[[], Intervals]
    close: Callable[[], None]
    remedy: str = "give raw counts"
    row_step: int = 1
    transposition: Transposition | None = None

    def __post_init__(self) -> None:
        if not self.n_cells or not len(self.columns):
            raise InputError(
                f"{self.path}: found {self.n_cells} cells x {len(self.columns)} peaks; expected at least one "
                "of each; check the file"
            )

    def __len__(self) -> int:
        return self.n_cells

    @property
    def note(self) -> str:
        """What the user should know of how the matrix is read, "" for nothing."""
        return "" if self.transposition is None else f"{self.place} is {self.transposition.note}"

    def prepare(
        self,
        rows: NDArray[np.int64] | None = None,
        advance: Callable[[int], None] = lambda _: None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """Do what has to be done once before rows can be read, unless an earlier run did it.

        rows: those that will be asked for, each once, in that order, among any number of -1; None: all as in the file
        advance: is told how many of the ``transposition.n_entries`` were worked through since it was last called
        memory_bytes: what is taken beside the program's memory
        Raises InputError for what is no matrix of counts, and StoreError where the disk has no room.
        """
        if self.transposition is not None:
            with self._reading():
                self.transposition.make(rows, advance, memory_bytes)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """One row a cell, indexed by barcode. Raises InputError where a barcode comes twice."""
        obs = self.read_obs()
        if not obs.index.is_unique:
            i = int(np.flatnonzero(obs.index.duplicated())[0])
            raise InputError(
                f"{self.path}: found barcode {shown(str(obs.index[i]))} again in row {i + 1}; "
                "expected each barcode once; make them unique, or give each sample as a file of its own"
            )
        return obs

    @cached_property
    def intervals(self) -> Intervals:
        """The peaks. Raises InputError for those without coordinates, and where one comes twice."""
        intervals = self.read_intervals()
        again = intervals.first_duplicate()
        if again is not None:
            raise InputError(
                f"{self.path}: found peak {intervals.name(again)} again as peak {again + 1}; "
                "expected each peak once; merge the two"
            )
        return intervals

    @cached_property
    def _peak_of_column(self) -> NDArray[np.int32] | None:
        """The peak of each column of the file's matrix, -1 for columns that are none; None where all are, in order."""
        return peaks_of_columns(self.columns, self.n_columns)

    def islands(self, rows: NDArray[np.int64], peaks: PeakSet) -> "IslandCounts":
        """Some cells over the islands, in the given order; row -1 has no count.

        Memory: the counts of about 1,000 cells and the open islands of all of them. Raises InputError as ``counts``.
        """
        step = max(1, _ROWS_AT_ONCE // self.row_step) * self.row_step
        # Where rows follow each other, parts begin where the file's chunks do.
        first = step - int(rows[0]) % step if len(rows) and rows[0] >= 0 else step
        cuts = [0, *range(first, len(rows), step), len(rows)]
        return IslandCounts.concatenate(
            [count_islands(self.counts(rows[a:b]), peaks) for a, b in pairwise(cuts)]
        )

    def counts(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """int64 [len(rows), n_peaks]: the counts of some rows in the given order; row -1 is all zeros.

        Entries of a peak that come twice in a cell add up, as in scipy. The cost follows the rows that are asked for.
        Raises InputError naming barcode, peak and value for anything but a whole number from 0 to 2^31 - 1.
        """
        if self.transposition is not None:
            with self._reading():
                rows = self.transposition.places(rows)
        if len(rows) and rows[0] >= 0 and (np.diff(rows) == 1).all():
            return self._checked(int(rows[0]), int(rows[-1]) + 1)
        wanted = np.unique(rows[rows >= 0])
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1) if len(wanted) else []
        found = [self._checked(int(run[0]), int(run[-1]) + 1) for run in runs]
        empty = sparse.csr_matrix((1, len(self.columns)), dtype=np.int64)
        stacked = sparse.vstack([*found, empty], format="csr", dtype=np.int64)
        return stacked[np.where(rows >= 0, np.searchsorted(wanted, rows), len(wanted))]

    def _checked(self, a: int, b: int) -> sparse.csr_matrix:
        """Rows a to b as counts of the peaks."""
        with self._reading():
            read = self.read_rows(a, b)
        peak, values, indptr = read.indices, read.data, read.indptr
        if self._peak_of_column is not None:
            peak = self._peak_of_column[peak]
            kept = peak >= 0
            before = np.concatenate([[0], np.cumsum(kept)])
            peak, values, indptr = peak[kept], values[kept], before[indptr]
        bad = self.first_bad(values)
        if bad is not None:
            row = int(np.searchsorted(indptr, bad, side="right")) - 1
            raise self.no_count(values[bad], a + row, int(peak[bad]))
        return sparse.csr_matrix((values.astype(np.int64), peak, indptr), shape=(b - a, len(self.columns)))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except (OSError, EOFError, KeyError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{self.path}: {self.place} cannot be read ({error}); expected a whole {self.kind} file; "
                "copy or make it again"
            ) from error

    def check_type(self, dtype: np.dtype[Any]) -> None:
        """Raise InputError where values of a type cannot be counts."""
        if dtype.kind not in "biuf":
            raise InputError(
                f"{self.path}: found values of type {dtype} in {self.place}; expected counts; {self.remedy}"
            )

    def first_bad(self, values: NDArray[Any]) -> int | None:
        """Where the first value is that is no count, None where all are."""
        if values.dtype.kind == "b":
            return None
        with np.errstate(invalid="ignore"):
            bad = ~((values >= 0) & (values <= _MAX_COUNT))
            if values.dtype.kind == "f":
                bad |= values != np.rint(values)
        return int(np.argmax(bad)) if bad.any() else None

    def no_count(self, value: Any, row: int, peak: int, where: str = "") -> InputError:
        """The error for a value that is no count; where: its place in the file, if it has one."""
        value, looks = float(value), ""
        if np.isfinite(value) and value > 0 and value != np.rint(value):
            looks = ", which looks normalised or log-transformed"
        barcode, name = shown(str(self.obs.index[row])), self.intervals.name(peak)
        return InputError(
            f"{self.path}: found {value:g} in {self.place}{where} for barcode {barcode}, peak {name}{looks}; "
            f"expected counts, whole numbers from 0 on; {self.remedy}"
        )


def peaks_of_columns(columns: NDArray[np.int64], n_columns: int) -> NDArray[np.int32] | None:
    """The peak of each column, -1 for columns that are none; None where all are peaks in their order."""
    if np.array_equal(columns, np.arange(n_columns)):
        return None
    peak = np.full(n_columns, -1, np.int32)
    peak[columns] = np.arange(len(columns))
    return peak


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


def check_compressed(path: Location, place: str, group: Mapping[str, Any], n_rows: int) -> None:
    """Raise InputError unless the array indptr of a group has the length and the ends for ``n_rows`` rows of values."""
    indptr, n_values = group["indptr"], len(group["data"])
    ends = [int(indptr[i]) for i in (0, -1)] if len(indptr) == n_rows + 1 else []
    if ends != [0, n_values] or len(group["indices"]) != n_values:
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
        (data, indices.astype(np.int32, copy=False), indptr), shape=(len(indptr) - 1, n_columns)
    )
