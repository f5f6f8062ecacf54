"""What a process of ``bench_positions.py`` does: find singular vectors of a store's cells, or compare those found.

    python benchmarks/positions_work.py TASK.json

TASK.json: {"work": "ours" | "sklearn" | "compare", "store": ..., "cells": n, "values": "idf" | "levels", "rank": ...,
...}. Ends with one line of JSON. CPU seconds are of the decomposition alone, with all that it reads.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from annatac_scale.progress import Silent
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.cell_matrix import CellMatrix
from annatac_scale.stream.selection import sequential
from annatac_scale.stream.vocabulary import Vocabulary, count_open
from annatac_scale.train.positions import inverse_document_frequency, truncated_svd

SEED = 0


class Passes(Silent):
    def __init__(self) -> None:
        self.n = 0

    def task(self, *arguments: Any, **options: Any) -> Any:
        self.n += 1
        return super().task(*arguments, **options)


def matrix_of(task: dict[str, Any]) -> CellMatrix:
    store = IslandStore.open(task["store"])
    cells = np.arange(min(task["cells"], store.n_cells))
    counts = count_open(store, cells)
    vocabulary = Vocabulary.fit(store, cells, 3, counts)
    idf = inverse_document_frequency(counts[vocabulary.islands], len(cells))
    return CellMatrix(store, vocabulary, cells, idf if task["values"] == "idf" else None)


def csr_of(matrix: CellMatrix) -> sparse.csr_matrix:
    """The same matrix, held, float32."""
    new_of_old = matrix.vocabulary.new_of_old()
    parts = [part.renumber(new_of_old) for _, part in sequential(matrix.store, matrix.cells)]
    csr = OpenIslands.concatenate(parts).to_csr(len(matrix.vocabulary)).astype(np.float32)
    if matrix.idf is not None:
        csr.data = matrix.idf[csr.indices]
        squares = np.asarray(csr.multiply(csr).sum(axis=1)).ravel()
        csr.data /= np.repeat(np.sqrt(np.where(squares > 0, squares, 1)), np.diff(csr.indptr))
    return csr


def ours(task: dict[str, Any]) -> dict[str, Any]:
    matrix, passes = matrix_of(task), Passes()
    truncated_svd(replace(matrix, cells=matrix.cells[:250]), 4, SEED, task["workers"])
    cpu, wall = time.process_time(), time.perf_counter()
    svd = truncated_svd(matrix, task["rank"], SEED, task["workers"], passes)
    figures = figures_of(matrix, cpu, wall)
    save(task, svd.components, svd.singular_values)
    return {**figures, "passes": passes.n}


def sklearn(task: dict[str, Any]) -> dict[str, Any]:
    matrix = matrix_of(task)
    csr = csr_of(matrix)
    cpu, wall = time.process_time(), time.perf_counter()
    seed = task.get("seed", SEED)
    svd = TruncatedSVD(task["rank"], algorithm="randomized", n_iter=task["n_iter"], random_state=seed).fit(
        csr
    )
    figures = figures_of(matrix, cpu, wall)
    save(task, svd.components_.T, svd.singular_values_)
    return figures


def figures_of(matrix: CellMatrix, cpu: float, wall: float) -> dict[str, Any]:
    seconds = time.process_time() - cpu
    return {
        "svd_cpu_s": round(seconds, 3),
        "svd_wall_s": round(time.perf_counter() - wall, 3),
        "cells": len(matrix.cells),
        "islands": len(matrix.vocabulary),
        "core_h_per_million": round(seconds / len(matrix.cells) * 1e6 / 3_600, 4),
    }


def save(task: dict[str, Any], components: np.ndarray, values: np.ndarray) -> None:
    np.savez(task["out"], components=components, values=values)


def compare(task: dict[str, Any]) -> dict[str, Any]:
    """How near each of ``found`` comes to ``reference``, files that the other works wrote."""
    csr = csr_of(matrix_of(task))
    reference = np.load(task["reference"])
    best = np.linalg.norm(csr @ reference["components"]) ** 2
    figures: dict[str, Any] = {}
    for name, path in task["found"].items():
        found = np.load(path)
        figures[name] = {
            "largest_value_error": float(np.abs(found["values"] / reference["values"] - 1).max()),
            "variance_share": float(np.linalg.norm(csr @ found["components"]) ** 2 / best),
            "overlap": {
                str(n): float(
                    np.linalg.norm(reference["components"][:, :n].T @ found["components"][:, :n]) ** 2 / n
                )
                for n in task["leading"]
            },
        }
    return figures


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({"ours": ours, "sklearn": sklearn, "compare": compare}[task["work"]](task)))


if __name__ == "__main__":
    main()
