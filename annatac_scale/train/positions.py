"""Position embeddings: TruncatedSVD of cells x islands by block power iteration, in passes over a store.

Source: annATAC (Cui et al., BMC Biology 2025), "position embedding": the right singular vectors of the training
matrix. The matrix is never held: a pass costs time in open islands x rank; each worker takes memory for the open
islands of 4,000 cells and some arrays of islands x rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from dask.base import compute
from dask.delayed import delayed
from numpy.typing import NDArray
from scipy import sparse

from annatac_scale.errors import ConfigError
from annatac_scale.progress import Advance, Progress, Silent
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.selection import sequential
from annatac_scale.stream.vocabulary import Vocabulary

VALUES = ("levels", "idf")
"""What an open island counts in the SVD: its level, as published; or its idf, rows scaled to length 1."""

OVERSAMPLING = 10
PASSES = 5
CELLS_PER_TASK = 4_000
"""Cells multiplied at a time. Fixed: the order of additions, and with it every bit, does not depend on workers."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Svd:
    """components: float32 [n_islands, rank], orthonormal columns, each one's largest entry positive;
    singular_values: float32 [rank], falling. ``rank`` is at most what was asked for, cells and islands."""

    components: Floats
    singular_values: Floats

    def leading(self, rank: int) -> "Svd":
        """The first ``rank`` of them."""
        return Svd(self.components[:, :rank], self.singular_values[:rank])


def inverse_document_frequency(open_counts: NDArray[np.integer], n_cells: int) -> Floats:
    """log(1 + cells / cells in which the island is open), float32 [n_islands]; an island never open counts as 1."""
    return np.log1p(n_cells / np.maximum(open_counts, 1)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class CellMatrix:
    """Cells x vocabulary, read from a store some thousand rows at a time.

    cells: int64 cell ids, each once
    idf: float32 [len(vocabulary)]; given, an open island counts its idf and rows have length 1; None, its level
    """

    store: IslandStore
    vocabulary: Vocabulary
    cells: NDArray[np.int64]
    idf: Floats | None = None

    def sum(self, work: Callable[[sparse.csr_matrix], Floats], workers: int, advance: Advance) -> Floats:
        """Sum of ``work`` over all rows, added in the order of cell ids, by some threads."""
        cells = np.sort(self.cells)
        total = delayed(None)
        for start in range(0, len(cells), CELLS_PER_TASK):
            part = delayed(self._done)(cells[start : start + CELLS_PER_TASK], work, advance)
            total = delayed(_add)(total, part)
        result: Floats = compute(total, scheduler="threads", num_workers=workers)[0]
        return result

    def _done(
        self, cells: NDArray[np.int64], work: Callable[[sparse.csr_matrix], Floats], advance: Advance
    ) -> Floats:
        done = work(self._rows(cells))
        advance(len(cells))
        return done

    def _rows(self, cells: NDArray[np.int64]) -> sparse.csr_matrix:
        new_of_old = self.vocabulary.new_of_old()
        parts = [part.renumber(new_of_old) for _, part in sequential(self.store, cells)]
        rows = OpenIslands.concatenate(parts)
        levels = rows.levels.astype(np.float32)
        values = levels if self.idf is None else _unit_rows(self.idf[rows.islands], rows)
        shape = len(rows), len(self.vocabulary)
        return sparse.csr_matrix((values, rows.islands, rows.offsets), shape=shape)


def truncated_svd(
    matrix: CellMatrix, rank: int, seed: int, workers: int = 1, progress: Progress | None = None
) -> Svd:
    """The leading right singular vectors; the same for any number of workers (threads)."""
    n_cells, n_islands = len(matrix.cells), len(matrix.vocabulary)
    rank = min(rank, n_cells, n_islands)
    columns = min(rank + OVERSAMPLING, n_cells, n_islands)
    start = np.random.default_rng(seed).standard_normal((n_islands, columns), dtype=np.float32)
    basis = _orthonormal(start)

    def over_cells(work: Callable[[sparse.csr_matrix], Floats], number: int) -> Floats:
        name = f"SVD, pass {number} of {PASSES + 1}"
        with (progress or Silent()).task(name, n_cells, "cells") as advance:
            return matrix.sum(work, workers, advance)

    for number in range(1, PASSES + 1):
        basis = _orthonormal(over_cells(partial(_power, basis), number))
    gram = over_cells(partial(_gram, basis), PASSES + 1)
    eigenvalues, rotation = np.linalg.eigh(gram.astype(np.float64))
    leading = np.argsort(eigenvalues)[::-1][:rank]
    components: Floats = basis @ np.asarray(rotation.real[:, leading], np.float32)
    largest = np.abs(components).argmax(axis=0)
    components *= np.where(components[largest, np.arange(rank)] < 0, -1, 1).astype(np.float32)
    return Svd(components, np.sqrt(np.maximum(eigenvalues[leading], 0)).astype(np.float32))


def position_table(svd: Svd, width: int, rms: float) -> Floats:
    """Positions float32 [n_islands, width]: components, zero columns where they are fewer, scaled to an RMS.

    rms: root mean square wanted of the whole table, that of the token embedding
    """
    if svd.components.shape[1] > width:
        raise ConfigError(f"{svd.components.shape[1]} singular vectors do not fit a width of {width}")
    table = np.zeros((len(svd.components), width), np.float32)
    table[:, : svd.components.shape[1]] = svd.components
    scale = float(np.sqrt(np.mean(np.square(table, dtype=np.float64))))
    return table * np.float32(rms / scale) if scale > 0 else table


def _unit_rows(values: Floats, rows: OpenIslands) -> Floats:
    """The values, one an open island, divided by the Euclidean length of their cell's."""
    squares = np.concatenate([np.zeros(1), np.cumsum(np.square(values, dtype=np.float64))])
    lengths: NDArray[np.float64] = np.sqrt(squares[rows.offsets[1:]] - squares[rows.offsets[:-1]])
    unit: Floats = np.divide(values, np.repeat(lengths, rows.n_open).astype(np.float32))
    return unit


def _power(basis: Floats, x: sparse.csr_matrix) -> Floats:
    product: Floats = x.T @ (x @ basis)
    return product


def _gram(basis: Floats, x: sparse.csr_matrix) -> Floats:
    projected: Floats = x @ basis
    return projected.T @ projected


def _add(total: Floats | None, part: Floats) -> Floats:
    """The sum, in the place of ``total``, which nobody else reads."""
    return part if total is None else np.add(total, part, out=total)


def _orthonormal(columns: Floats) -> Floats:
    orthonormal: Floats = np.linalg.qr(columns)[0]
    return orthonormal
