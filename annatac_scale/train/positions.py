"""Position embeddings: TruncatedSVD of cells x islands by block power iteration, in passes over a store.

Source: annATAC (Cui et al., BMC Biology 2025), "position embedding": the right singular vectors of the training
matrix. The matrix is never held: a pass costs time in open islands x columns, a column being a singular vector asked
for or one of OVERSAMPLING more. Memory: two tables of islands x columns in float32, one more for each worker (thread),
and for each worker 4,000 cells at a time. The iteration is shifted, which costs nothing: five passes do what seven did
(Feng, Yu, Xie, Tang, "Faster Randomized SVD with Dynamic Shifts", ACM TOMS 2024).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from dask.base import compute
from dask.delayed import Delayed, delayed
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from annatac_scale.errors import ConfigError
from annatac_scale.progress import Advance, Progress, Silent
from annatac_scale.stream.cell_matrix import CellMatrix

VALUES = ("levels", "idf")
"""What an open island counts in the SVD: its level, as published; or its idf, rows scaled to length 1."""

OVERSAMPLING = 10
PASSES = 5
TOLERANCE = 1e-4
"""Largest change of a singular value, as a share of it, at which it counts as found."""

CELLS_PER_TASK = 16_000
"""Cells multiplied into one table. Fixed: the order of additions, and with it every bit, does not depend on workers."""

MOST_BYTES = 4 * 2**30
"""Of the tables of all workers together: where tables are large fewer workers take part (600,000 islands: 8)."""

ROWS_PER_TASK = 8_192
"""Rows of a table that are made orthonormal at a time, at least."""

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


def truncated_svd(
    matrix: CellMatrix, rank: int, seed: int, workers: int = 1, progress: Progress | None = None
) -> Svd:
    """The leading right singular vectors; the same, bit for bit, for any number of workers (threads).

    BLAS, which rounds otherwise with more threads, gets one in each of them. Passes end when
    no singular value changes by more than TOLERANCE of its own, and at the latest after PASSES.
    """
    rank = min(rank, len(matrix.cells), len(matrix.vocabulary))
    with threadpool_limits(1, "blas"):
        basis, values = _iterated(matrix, rank, seed, workers, progress or Silent())
    components = basis[:, :rank].copy()
    largest = np.abs(components).argmax(axis=0)
    components *= np.where(components[largest, np.arange(rank)] < 0, -1, 1).astype(np.float32)
    return Svd(components, np.sqrt(values[:rank]).astype(np.float32))


def _iterated(
    matrix: CellMatrix, rank: int, seed: int, workers: int, progress: Progress
) -> tuple[Floats, NDArray[np.float64]]:
    """The eigenvectors of X^T X in columns, somewhat more than ``rank``, and its eigenvalues, falling."""
    n_cells, n_islands = len(matrix.cells), len(matrix.vocabulary)
    columns = min(rank + OVERSAMPLING, n_cells, n_islands)
    basis = np.random.default_rng(seed).standard_normal((n_islands, columns), dtype=np.float32)
    iteration = _Iteration(matrix, basis, workers)
    iteration.orthonormalise()
    values, shift = np.zeros(columns), 0.0
    for number in range(1, PASSES + 1):
        with progress.task(f"SVD, pass {number} of at most {PASSES}", n_cells, "cells") as advance:
            iteration.multiply(advance)
        before, values = values, shift + iteration.orthonormalise(shift)
        if np.all(np.abs(values - before)[:rank] <= 2 * TOLERANCE * values[:rank]):
            break
        shift = max(shift, values[-1] / 2)
    return basis, values


class _Iteration:
    """The block power iteration: multiplies a basis with X^T X and makes its columns orthonormal again, by turns.

    basis: float32 [n_islands, columns], whose memory it uses

    It holds as much once more for the product, and once for each worker, as far as there are parts for them and they
    fit into MOST_BYTES.
    """

    def __init__(self, matrix: CellMatrix, basis: Floats, workers: int) -> None:
        self._matrix = matrix
        self._workers = max(1, min(workers, MOST_BYTES // max(1, basis.nbytes)))
        self._parts = matrix.parts(CELLS_PER_TASK)
        self._own = [np.empty_like(basis) for _ in self._parts[: self._workers]]
        self._product = basis.copy()
        self.basis = basis

    def multiply(self, advance: Advance) -> None:
        """One pass over the store: the product of X^T X and the basis.

        A part's product is made in memory of its worker's, and parts are added in their order: one is begun when that
        one is added which had the memory before.
        """
        self._product[:] = 0
        added: list[Delayed] = []
        for number, part in enumerate(self._parts):
            own = self._own[number % len(self._own)]
            free = added[number - len(self._own)] if number >= len(self._own) else None
            multiplied = delayed(self._multiplied)(part, own, advance, free)
            added.append(delayed(self._add)(multiplied, added[-1] if added else None))
        compute(*added[-1:], scheduler="threads", num_workers=self._workers)

    def _multiplied(self, part: NDArray[np.int64], own: Floats, advance: Advance, _after: None) -> Floats:
        own[:] = 0
        self._matrix.add_products(part, self.basis, own, advance)
        return own

    def _add(self, own: Floats, _after: None) -> None:
        self._product += own

    def orthonormalise(self, shift: float = 0.0) -> NDArray[np.float64]:
        """The basis becomes the left singular vectors of (product - shift x basis); returns its singular values.

        QR of blocks of rows, then the SVD of all their triangles (Demmel et al. 2012): in place, and stable.
        """
        n_islands, n_columns = self.basis.shape
        n_blocks = max(1, n_islands // max(ROWS_PER_TASK, n_columns))
        blocks = list(
            zip(np.array_split(self.basis, n_blocks), np.array_split(self._product, n_blocks), strict=True)
        )
        triangles = self._each(delayed(_triangle)(*block, shift) for block in blocks)
        left, values, _ = np.linalg.svd(np.concatenate(triangles).astype(np.float64), full_matrices=False)
        rotations = np.split(left.astype(np.float32), n_blocks)
        self._each(
            delayed(_rotate)(block, rotation) for (block, _), rotation in zip(blocks, rotations, strict=True)
        )
        return values

    def _each(self, tasks: Iterable[Delayed]) -> list[Any]:
        return list(compute(*tasks, scheduler="threads", num_workers=self._workers))


def _triangle(basis: Floats, product: Floats, shift: float) -> Floats:
    """The orthonormal columns of (product - shift x basis), put into ``basis``; returns the triangle."""
    product -= np.float32(shift) * basis
    basis[:], triangle = np.linalg.qr(product)
    return triangle


def _rotate(basis: Floats, rotation: Floats) -> None:
    basis[:] = basis @ rotation


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
