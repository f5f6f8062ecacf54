"""The vocabulary of a model: the islands of its space that it has a token for."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit
from numpy.typing import NDArray

from annatac_scale.errors import InputError, ModelError
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.schema import N_LEVELS
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.selection import sequential

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """An ordered subset of an island space; island ``i`` of a model is island ``islands[i]`` of the space.

    space_sha256: of the IslandSpace
    n_space: islands of the space
    islands: int32 [N], increasing
    """

    space_sha256: str
    n_space: int
    islands: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.islands)

    @classmethod
    def fit(
        cls,
        store: IslandStore,
        cells: NDArray[np.integer] | None,
        min_cells: int = 3,
        counts: Ints | None = None,
    ) -> "Vocabulary":
        """The islands open in at least ``min_cells`` of the cells and measured in a sample of one of them.

        cells: int64 cell ids, None for all
        counts: what ``count_open(store, cells)`` gave, where that is known: it spares a pass over the store

        Raises InputError where no island is left.
        """
        if counts is None:
            counts = count_open(store, cells)
        islands = np.flatnonzero((counts >= min_cells) & _measured_in_some(store, cells))
        if not len(islands):
            raise InputError(
                f"{store.path}: found no island that is open in {min_cells} or more of the chosen cells (at "
                f"most in {counts.max(initial=0)}); choose more cells or a smaller min_cells"
            )
        return cls(store.islands_sha256, store.n_islands, islands.astype(np.int32))

    @cached_property
    def sha256(self) -> str:
        """Hex digest of ``space_sha256`` and the islands as little-endian int32."""
        return hashlib.sha256(self.space_sha256.encode() + self.islands.astype("<i4").tobytes()).hexdigest()

    def new_of_old(self) -> NDArray[np.int32]:
        """Number in the vocabulary of each island of the space, -1 where it has none, int32 [n_space]."""
        numbers = np.full(self.n_space, -1, np.int32)
        numbers[self.islands] = np.arange(len(self.islands), dtype=np.int32)
        return numbers

    def check_space(self, store: IslandStore) -> None:
        """Raise ModelError unless the store has the islands of the vocabulary's space."""
        if store.islands_sha256 != self.space_sha256:
            raise ModelError(
                f"{store.path}: the store's islands have sha256 {store.islands_sha256[:12]}, the model's "
                f"{self.space_sha256[:12]}; convert the cells with the model's assembly, selection and width"
            )

    def measured(self, store: IslandStore) -> list[NDArray[np.int32]]:
        """For each sample in the store's order the vocabulary's islands that it measures: int32, increasing.

        Raises ModelError for a store of other islands.
        """
        self.check_space(store)
        return [
            np.flatnonzero(sample.measured[self.islands]).astype(np.int32)
            for sample in store.samples.values()
        ]


def count_open(
    store: IslandStore, cells: NDArray[np.integer] | None = None, progress: Progress | None = None
) -> Ints:
    """In how many of the cells each island of the store is open, int64 [n_islands]; one pass over the store.

    cells: int64 cell ids, None for all
    """
    return count_levels(store, cells, progress).sum(0)


def count_levels(
    store: IslandStore, cells: NDArray[np.integer] | None = None, progress: Progress | None = None
) -> Ints:
    """In how many of the cells each island is at level 1 to 5, int64 [5, n_islands]; arguments as of ``count_open``."""
    counts = np.zeros((N_LEVELS, store.n_islands), np.int64)
    n_cells = store.n_cells if cells is None else len(cells)
    with (progress or Silent()).task("Counting open islands", n_cells, "cells") as advance:
        for ids, rows in sequential(store, cells):
            _count(rows.islands, rows.levels, counts)
            advance(len(ids))
    return counts


def _measured_in_some(store: IslandStore, cells: NDArray[np.integer] | None) -> NDArray[np.bool_]:
    """Islands that a sample of one of the cells measures, bool [n_islands]."""
    measured = np.zeros(store.n_islands, np.bool_)
    for sample in store.samples.values():
        own = range(sample.first_cell, sample.first_cell + sample.n_cells)
        if len(own) and (cells is None or np.any((cells >= own.start) & (cells < own.stop))):
            measured |= sample.measured
    return measured


@njit(nogil=True, cache=True)
def _count(islands: NDArray[np.int32], levels: NDArray[np.uint8], counts: Ints) -> None:
    for i in range(len(islands)):
        counts[levels[i] - 1, islands[i]] += 1
