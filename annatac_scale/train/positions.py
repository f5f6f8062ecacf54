"""Position embeddings: TruncatedSVD of cells x islands by block power iteration, in passes over a store.

Source: annATAC (Cui et al., BMC Biology 2025), "position embedding": the right singular vectors of the training
matrix. The matrix is never held: a pass costs time in open islands x rank, memory is islands x rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from dask.base import compute
from dask.delayed import delayed
from numpy.typing import NDArray
from scipy import sparse

from annatac_scale.errors import ConfigError
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.selection import sequential
from annatac_scale.stream.vocabulary import Vocabulary

VALUES = ("levels", "idf")
"""What an open island counts in the SVD: its level, as published; or its idf, rows scaled to length 1."""

OVERSAMPLING = 10
PASSES = 5
CELLS_PER_TASK = 16_000
"""Fixed, so that the order of additions, and with it every bit of the result, does not depend on workers."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Svd:
    """components: float32 [n_islands, rank], orthonormal columns, each one's largest entry positive;
    singular_values: float32 [rank], falling. ``rank`` is at most what was asked for, cells and islands."""

    components: Floats
    singular_values: Floats


def inverse_document_frequency(open_counts: NDArray[np.integer], n_cells: int) -> Floats:
    """log(1 + cells / cells in which the island is open), float32 [n_islands]; an island never open counts as 1."""
    return np.log1p(n_cells / np.maximum(open_counts, 1)).astype(np.float32)


def truncated_svd(
    store: IslandStore,
    vocabulary: Vocabulary,
    cells: NDArray[np.int64],
    rank: int,
    seed: int,
    idf: Floats | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Svd:
    """The leading right singular vectors of cells x vocabulary.

    cells: int64 cell ids, the training cells
    idf: float32 [len(vocabulary)]; given, an open island counts idf and rows have length 1; None, its level
    The result is the same for any number of workers (threads).
    """
    rank = min(rank, len(cells), len(vocabulary))
    columns = min(rank + OVERSAMPLING, len(cells), len(vocabulary))
    rng = np.random.default_rng(seed)
    basis = _orthonormal(rng.standard_normal((len(vocabulary), columns), dtype=np.float32))
    runs = [cells[i : i + CELLS_PER_TASK] for i in range(0, len(cells), CELLS_PER_TASK)]
    new_of_old = vocabulary.new_of_old()

    def over_runs(work: Callable[[sparse.csr_matrix], Floats], name: str) -> Floats:
        with (progress or Silent()).task(name, len(cells), "cells") as advance:

            def one(run: NDArray[np.int64]) -> Floats:
                total: Any = 0
                for ids, rows in sequential(store, run):
                    total = total + work(_matrix(rows.renumber(new_of_old), len(vocabulary), idf))
                    advance(len(ids))
                return total

            total = delayed(0)
            for run in runs:
                total = delayed(_add)(total, delayed(one)(run))
            result: Floats = compute(total, scheduler="threads", num_workers=workers)[0]
        return result

    for number in range(1, PASSES + 1):
        basis = _orthonormal(over_runs(partial(_power, basis), f"SVD, pass {number} of {PASSES + 1}"))
    gram = over_runs(partial(_gram, basis), f"SVD, pass {PASSES + 1} of {PASSES + 1}")
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


def _matrix(rows: OpenIslands, n_islands: int, idf: Floats | None) -> sparse.csr_matrix:
    """The cells as a matrix of levels, or of idf with rows of length 1."""
    values = rows.levels.astype(np.float32) if idf is None else _unit_rows(idf[rows.islands], rows)
    return sparse.csr_matrix((values, rows.islands, rows.offsets), shape=(len(rows), n_islands))


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


def _add(total: Any, part: Any) -> Any:
    return total + part


def _orthonormal(columns: Floats) -> Floats:
    orthonormal: Floats = np.linalg.qr(columns)[0]
    return orthonormal
