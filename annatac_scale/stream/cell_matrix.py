"""A store's cells x islands as a matrix that is never held: some thousand rows at a time are read and multiplied."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from annatac_scale.progress import Advance
from annatac_scale.store.compiled import multiplying
from annatac_scale.store.encoded_rows import EncodedRows
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.schema import N_LEVELS, SHARD_CELLS
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import RowsOrigin
from annatac_scale.stream.selection import Selection
from annatac_scale.stream.vocabulary import Vocabulary

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_BAND = 512
"""Islands whose rows of a table are worked on by one cell after the other: they stay in the cache (0.4 MB at 210)."""


@dataclass(frozen=True, eq=False)
class CellMatrix:
    """Cells x vocabulary.

    cells: int64 cell ids, each once
    idf: float32 [len(vocabulary)]; given, an open island counts its idf and rows have length 1; None, its level
    """

    store: IslandStore
    vocabulary: Vocabulary
    cells: NDArray[np.int64]
    idf: Floats | None = None

    def parts(self, n_cells: int) -> list[Ints]:
        """The matrix in parts of about ``n_cells`` rows in order of cell ids: entries of its selection, int64."""
        return _runs(self._selection, np.flatnonzero(self._selection.block_sizes), n_cells)

    def add_products(self, part: Ints, basis: Floats, total: Floats, advance: Advance) -> None:
        """Add X^T (X basis) to ``total``, X being the rows of a part; float32 [len(vocabulary), columns] both.

        Takes memory for 4,000 cells: their open islands and ``columns`` numbers each. No lock is held.
        """
        values = _values(self.idf, len(self.vocabulary))
        for entries in _runs(self._selection, part, SHARD_CELLS):
            rows = self._rows(entries)
            room = _Room(
                np.empty((len(rows), basis.shape[1]), np.float32),
                np.empty(len(rows), np.float64),
                np.empty(len(rows), np.int64),
            )
            _multiply(rows.offsets, rows.islands, rows.levels, values, basis, room, total)
            advance(len(rows))

    @cached_property
    def _selection(self) -> Selection:
        return Selection(self.store, self.cells)

    @cached_property
    def _origin(self) -> RowsOrigin:
        return RowsOrigin(str(self.store.path), self.store.n_islands, self.vocabulary.new_of_old())

    def _rows(self, entries: Ints) -> OpenIslands:
        """The open islands of the cells of some entries, numbered as in the vocabulary."""
        ids, rows = zip(*self._encoded(entries), strict=True)
        return self._origin.decode(np.concatenate(ids), EncodedRows.concatenate(rows))

    def _encoded(self, entries: Ints) -> Iterator[tuple[Ints, EncodedRows]]:
        """Cell ids and rows of each entry; blocks of a sample are read together."""
        blocks = [(*self._selection.block(entry), entry) for entry in entries.tolist()]
        for sample, run in groupby(blocks, key=lambda block: block[0]):
            own = list(run)
            chunks = sample.read_chunks([number for _, number, _, _ in own])
            for (_, number, first_cell, entry), chunk in zip(own, chunks, strict=True):
                ids = self._selection.ids(entry, 0, int(self._selection.block_sizes[entry]))
                yield ids, sample.decompress(number, chunk).take(ids - first_cell)


def _runs(selection: Selection, entries: Ints, n_cells: int) -> list[Ints]:
    """The entries in runs, each of those that begin within the same ``n_cells`` cells."""
    sizes = selection.block_sizes[entries]
    number = (np.cumsum(sizes) - sizes) // n_cells
    return np.split(entries, np.flatnonzero(np.diff(number)) + 1) if len(entries) else []


class _Values(NamedTuple):
    """What an open island counts: its level's worth times its island's, over the length of its row where that is asked.

    of_level: float32 [6]; of_island: float32 [len(vocabulary)]
    """

    of_level: Floats
    of_island: Floats
    unit_rows: bool


def _values(idf: Floats | None, n_islands: int) -> _Values:
    levels = np.arange(N_LEVELS + 1, dtype=np.float32)
    if idf is None:
        return _Values(levels, np.ones(n_islands, np.float32), False)
    return _Values(np.minimum(levels, 1), idf, True)


class _Room(NamedTuple):
    """What the kernel works in.

    projected: float32 [n, columns], the rows times the basis; squares: float64 [n], of the rows' lengths
    next: int64 [n], how far each row is done
    """

    projected: Floats
    squares: NDArray[np.float64]
    next: Ints


@multiplying
def _multiply(offsets, islands, levels, values, basis, room, total):  # type: ignore[no-untyped-def]
    """Add X^T (X basis) to ``total``, band after band of islands, whose rows of the tables so stay in the cache."""
    n_islands, n_columns = basis.shape
    for cell in range(len(offsets) - 1):
        room.next[cell], room.squares[cell] = offsets[cell], 0
        for column in range(n_columns):
            room.projected[cell, column] = 0
    for stop in range(_BAND, n_islands + _BAND, _BAND):
        for cell in range(len(offsets) - 1):
            at, end, squares = np.uint64(room.next[cell]), np.uint64(offsets[cell + 1]), room.squares[cell]
            projected = room.projected[cell]
            while at < end and islands[at] < stop:
                island = np.uint64(islands[at])
                value = values.of_level[levels[at]] * values.of_island[island]
                squares += value * value
                for column in range(n_columns):
                    projected[column] += value * basis[island, column]
                at += np.uint64(1)
            room.next[cell], room.squares[cell] = at, squares
    for cell in range(len(offsets) - 1):
        room.next[cell] = offsets[cell]
        if values.unit_rows and room.squares[cell] > 0:
            for column in range(n_columns):
                room.projected[cell, column] /= room.squares[cell]
    for stop in range(_BAND, n_islands + _BAND, _BAND):
        for cell in range(len(offsets) - 1):
            at, end = np.uint64(room.next[cell]), np.uint64(offsets[cell + 1])
            projected = room.projected[cell]
            while at < end and islands[at] < stop:
                island = np.uint64(islands[at])
                value = values.of_level[levels[at]] * values.of_island[island]
                for column in range(n_columns):
                    total[island, column] += value * projected[column]
                at += np.uint64(1)
            room.next[cell] = at
