"""The cells of a store that take part, block by block, how often in an epoch, and a plain pass over them in order.

Everything is held as arrays over blocks: 100 million cells are 400,000 blocks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import ConfigError, InputError
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.schema import BLOCK_CELLS
from annatac_scale.store.store import IslandStore, Sample
from annatac_scale.stream.hashes import mixed, numbers_of, text_hashes

Ints = NDArray[np.int64]

MOST_ENTRIES = 2**26
"""Turns of blocks in an epoch that weights may ask for: 16 billion cells of full blocks."""


@dataclass(frozen=True, eq=False)
class _Turns:
    """Entries where weights are given.

    block: int64 [n_entries], increasing; size: int64 [n_entries]
    is_part: bool [n_entries], whether an entry is a part of its block that changes with the epoch
    keys: uint64 [n_samples], of each sample's random numbers
    """

    block: Ints
    size: Ints
    is_part: NDArray[np.bool_]
    keys: NDArray[np.uint64]


class Selection:
    """Cells of a store, and their turns in an epoch.

    An *entry* is a block of the store, or one more turn of it. Without weights there is one a block, in order.

    cells: int64 cell ids in any order, each once; None means all cells
    weights: sample -> turns of each of its selected cells in an epoch, 1 for samples that are not named. 2 is every
        cell twice, 0 none; 2.5 is twice, and half of them once more. Of n cells, 0.25 is round(n / 4) turns.
        How many of each block take part is the same in all epochs, so that all epochs are equally long; which ones
        follows from (seed, epoch, sample, block), going round, so that over the epochs no cell of a block has had
        two turns more than another. A weight so small that a block gets no turn leaves it out of all epochs
    block_sizes: int64 [n_entries], cells of each entry

    Raises InputError for an id that the store does not have, or that comes twice, for a sample that it does not have,
    and where weights leave nothing; ConfigError for a weight that is no number from 0 on.
    """

    def __init__(
        self,
        store: IslandStore,
        cells: NDArray[np.integer] | None = None,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        self._samples = list(store.samples.values())
        self._first_blocks = np.cumsum([0, *(sample.n_blocks for sample in self._samples)], dtype=np.int64)
        self._first_cells = np.array([sample.first_cell for sample in self._samples], np.int64)
        self._ids = None if cells is None else sorted_ids(store, cells)
        borders = np.append(self._cells_of_blocks(), store.n_cells)
        self._borders = borders if self._ids is None else np.searchsorted(self._ids, borders)
        self._turns = None if weights is None else self._weighted(store, weights, seed)
        self.block_sizes: Ints = np.diff(self._borders) if self._turns is None else self._turns.size

    def __len__(self) -> int:
        """Cells of an epoch, each turn counted."""
        return int(self.block_sizes.sum())

    def block(self, entry: int) -> tuple[Sample, int, int]:
        """The block of an entry: its sample, its number within the sample, and the cell id of its first row."""
        sample, number = self._place(self._block_of(entry))
        return self._samples[sample], number, self._samples[sample].first_cell + number * BLOCK_CELLS

    def ids(self, entry: int, start: int, stop: int, epoch: int = 0) -> Ints:
        """Cell ids, increasing, of the selected cells ``start`` to ``stop`` of an entry."""
        block = self._block_of(entry)
        first = int(self._borders[block])
        if self._turns is not None and self._turns.is_part[entry]:
            places = first + self._part(self._turns, entry, epoch)[start:stop]
            return places if self._ids is None else self._ids[places]
        if self._ids is None:
            return np.arange(first + start, first + stop)
        return self._ids[first + start : first + stop]

    def read(self, entry: int, start: int, stop: int, epoch: int = 0) -> OpenIslands:
        """Open islands of the selected cells ``start`` to ``stop`` of an entry."""
        sample, number, first_cell = self.block(entry)
        rows = sample.read_block(number)
        if stop - start == len(rows):
            return rows
        return rows.take(self.ids(entry, start, stop, epoch) - first_cell)

    def _cells_of_blocks(self) -> Ints:
        """Cell id of the first row of each block, int64 [n_blocks]."""
        n_blocks = np.diff(self._first_blocks)
        number = np.arange(self._first_blocks[-1]) - np.repeat(self._first_blocks[:-1], n_blocks)
        return np.repeat(self._first_cells, n_blocks) + number * BLOCK_CELLS

    def _block_of(self, entry: int) -> int:
        return int(entry if self._turns is None else self._turns.block[entry])

    def _place(self, block: int) -> tuple[int, int]:
        """Number of a block's sample, and of the block within it."""
        sample = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        return sample, block - int(self._first_blocks[sample])

    def _weighted(self, store: IslandStore, weights: Mapping[str, float], seed: int) -> _Turns:
        checked = _checked_weights(store, weights)
        n_blocks = np.diff(self._first_blocks)
        weight, sizes = np.repeat(checked, n_blocks), np.diff(self._borders)
        if (weight[sizes > 0]).sum() > MOST_ENTRIES:
            raise ConfigError(
                f"weights: ask for more than {MOST_ENTRIES:,} turns of blocks in an epoch; choose smaller ones: only "
                "how they compare with each other matters"
            )
        starts = np.repeat(self._borders[self._first_blocks[:-1]], n_blocks)
        extra = _fair_parts(weight % 1, self._borders[:-1] - starts, sizes)
        turns = np.where(sizes > 0, np.floor(weight).astype(np.int64) + (extra > 0), 0)
        block = np.repeat(np.arange(len(sizes)), turns)
        is_part = np.zeros(len(block), np.bool_)
        is_part[(np.cumsum(turns) - 1)[extra > 0]] = True
        size = np.where(is_part, extra[block], sizes[block])
        if sizes.any() and not len(block):
            raise InputError(
                f"{store.path}: the weights leave none of {sizes.sum():,} cells a turn; give a sample a larger weight"
            )
        return _Turns(block, size, is_part, text_hashes(list(store.samples), seed))

    def _part(self, turns: _Turns, entry: int, epoch: int) -> Ints:
        """Which of the selected cells of a block an entry takes, increasing: the next ones of a fixed random order."""
        block, n = int(turns.block[entry]), int(turns.size[entry])
        size = int(self._borders[block + 1] - self._borders[block])
        sample, number = self._place(block)
        key = mixed(turns.keys[sample : sample + 1] ^ np.uint64(number + 1))[0]
        order = np.argsort(numbers_of(key, np.arange(size)), kind="stable")
        return np.sort(order[(epoch * n % size + np.arange(n)) % size])


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


def sorted_ids(store: IslandStore, cells: NDArray[np.integer]) -> Ints:
    """Cell ids in order, int64; the array itself where it is that already.

    Raises InputError for an id that the store does not have, or that comes twice.
    """
    ids = np.asarray(cells, np.int64)
    if np.any(ids[1:] <= ids[:-1]):
        ids = np.sort(ids)
    if len(ids) and (ids[0] < 0 or ids[-1] >= store.n_cells):
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise InputError(
            f"{store.path}: no cell {wrong}; ids run from 0 to {store.n_cells - 1}: give ids of this store"
        )
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise InputError(f"{store.path}: cell {twice[0]} is given twice; give each cell id once")
    return ids


def _checked_weights(store: IslandStore, weights: Mapping[str, float]) -> NDArray[np.float64]:
    """The weight of each sample, float64 [n_samples]."""
    for name, weight in weights.items():
        if name not in store.samples:
            some = ", ".join(list(store.samples)[:10])
            raise InputError(
                f"{store.path}: weights name the sample {name!r}, which is not there; there are {some}"
                f"{', ...' if len(store.samples) > 10 else ''}; give one of these"
            )
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= weight < np.inf:
            raise ConfigError(
                f"weights: found {weight!r} for the sample {name!r}; expected a number from 0 on, as 2.5"
            )
    return np.array([weights.get(name, 1) for name in store.samples], np.float64)


def _fair_parts(share: NDArray[np.float64], before: Ints, sizes: Ints) -> Ints:
    """How many of each block take part so that of the first n cells of a sample always round(share * n) do, int64.

    share: of the block's sample; before: cells of the sample before the block
    """
    return (np.floor(share * (before + sizes) + 0.5) - np.floor(share * before + 0.5)).astype(np.int64)
