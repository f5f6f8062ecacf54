"""The cells of a store that take part, block by block, and a plain pass over them in order."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore

Ints = NDArray[np.int64]


class Selection:
    """Cells of a store in order of their ids; a cell's *position* is its place in that order.

    cells: int64 cell ids in any order, each once; None means all cells
    block_sizes: int64 [n_blocks], selected cells of each block of the store

    Raises InputError for an id that the store does not have, or that comes twice.
    """

    def __init__(self, store: IslandStore, cells: NDArray[np.integer] | None = None) -> None:
        self._store = store
        self._blocks = store.blocks()
        self._ids = None if cells is None else _sorted_ids(store, cells)
        borders = np.array([*(block.first_cell for block in self._blocks), store.n_cells], np.int64)
        self._borders = borders if self._ids is None else np.searchsorted(self._ids, borders)
        self.block_sizes: Ints = np.diff(self._borders)

    def __len__(self) -> int:
        return int(self.block_sizes.sum())

    def ids(self, block: int, start: int, stop: int) -> Ints:
        """Cell ids of the selected cells ``start`` to ``stop`` of a block."""
        first = int(self._borders[block])
        if self._ids is None:
            return np.arange(first + start, first + stop)
        return self._ids[first + start : first + stop]

    def read(self, block: int, start: int, stop: int) -> OpenIslands:
        """Open islands of the selected cells ``start`` to ``stop`` of a block."""
        rows = self._store.read_block(self._blocks[block])
        if stop - start == len(rows):
            return rows
        return rows.take(self.ids(block, start, stop) - self._blocks[block].first_cell)


def sequential(
    store: IslandStore, cells: NDArray[np.integer] | None = None, batch_size: int | None = None
) -> Iterator[tuple[Ints, OpenIslands]]:
    """Pass over cells in order of their ids, block by block: (cell ids int64 [m], open islands of m cells).

    cells: int64 cell ids in any order, each once; None means all
    batch_size: the most cells at a time; a batch never holds cells of two blocks

    Raises InputError as Selection does.
    """
    selection = Selection(store, cells)
    for block in np.flatnonzero(selection.block_sizes).tolist():
        size = int(selection.block_sizes[block])
        ids, rows = selection.ids(block, 0, size), selection.read(block, 0, size)
        step = batch_size or size
        for start in range(0, size, step):
            yield ids[start : start + step], rows[start : start + step]


def _sorted_ids(store: IslandStore, cells: NDArray[np.integer]) -> Ints:
    ids = np.sort(np.asarray(cells, np.int64))
    if len(ids) and (ids[0] < 0 or ids[-1] >= store.n_cells):
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise InputError(
            f"{store.path}: no cell {wrong}; ids run from 0 to {store.n_cells - 1}: give ids of this store"
        )
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise InputError(f"{store.path}: cell {twice[0]} is given twice; give each cell id once")
    return ids
