"""Open islands of some cells as three flat arrays: the form in which cells travel between all floors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from annatac_scale.store.compiled import compiled

if TYPE_CHECKING:
    from scipy import sparse


@dataclass(frozen=True, eq=False)
class OpenIslands:
    """The open islands of ``n`` cells; whatever is not listed is closed.

    offsets: int64 [n + 1], cell ``i`` owns the slice ``offsets[i]:offsets[i + 1]`` of the two other arrays
    islands: int32 [n_open], strictly increasing within a cell
    levels: uint8 [n_open], 1 to 5
    """

    offsets: NDArray[np.int64]
    islands: NDArray[np.int32]
    levels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_open(self) -> NDArray[np.int64]:
        """Open islands of each cell, int64 [n]."""
        return np.diff(self.offsets)

    @classmethod
    def empty(cls, n_cells: int = 0) -> "OpenIslands":
        """``n_cells`` cells without an open island."""
        return cls(np.zeros(n_cells + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.uint8))

    @classmethod
    def concatenate(cls, parts: Sequence["OpenIslands"]) -> "OpenIslands":
        """The cells of all parts, in order."""
        if not parts:
            return cls.empty()
        counts = np.concatenate([part.n_open for part in parts])
        return cls(
            np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)]),
            np.concatenate([part.islands for part in parts]),
            np.concatenate([part.levels for part in parts]),
        )

    @classmethod
    def from_csr(cls, matrix: "sparse.csr_matrix") -> "OpenIslands":
        """From a canonical CSR matrix cells x islands whose values are levels 1 to 5."""
        return cls(
            matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data.astype(np.uint8)
        )

    def to_csr(self, n_islands: int) -> "sparse.csr_matrix":
        """As a CSR matrix uint8 [n, n_islands]."""
        from scipy import sparse

        return sparse.csr_matrix((self.levels, self.islands, self.offsets), shape=(len(self), n_islands))

    def __getitem__(self, cells: slice) -> "OpenIslands":
        start, stop, step = cells.indices(len(self))
        if step != 1:
            raise IndexError("OpenIslands takes slices of step 1; use take() for any other selection")
        stop = max(start, stop)
        a, b = self.offsets[start], self.offsets[stop]
        return OpenIslands(self.offsets[start : stop + 1] - a, self.islands[a:b], self.levels[a:b])

    def take(self, cells: NDArray[np.int64]) -> "OpenIslands":
        """The given cells (positions, int64 [m]), in the given order, repeats allowed."""
        cells = np.asarray(cells, np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.n_open[cells])])
        taken = OpenIslands(offsets, np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.uint8))
        _take(self.offsets, self.islands, self.levels, cells, taken.offsets, taken.islands, taken.levels)
        return taken

    def renumber(self, new_of_old: NDArray[np.int32]) -> "OpenIslands":
        """Replace island ``i`` by ``new_of_old[i]``, dropping islands whose new number is -1.

        new_of_old: int32 [n_islands], increasing where it is not -1, so that rows stay sorted.
        """
        renumbered = new_of_old[self.islands]
        kept = renumbered >= 0
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept, dtype=np.int64)])
        return OpenIslands(before[self.offsets], renumbered[kept], self.levels[kept])


@compiled
def _take(offsets, islands, levels, cells, new_offsets, new_islands, new_levels):  # type: ignore[no-untyped-def]
    """Copy the rows ``cells`` one after the other; each is within the arrays, and negative ones count from the end."""
    for i in range(len(cells)):
        cell = cells[i] if cells[i] >= 0 else cells[i] + len(offsets) - 1
        source = offsets[cell]
        for target in range(new_offsets[i], new_offsets[i + 1]):
            new_islands[target] = islands[source]
            new_levels[target] = levels[source]
            source += 1
