"""What a peer is given and gives back, through files. Runs in the peer's own environment, on Python 3.7 and later.

A task folder holds ``rows.npz`` (CSR, all cells), ``cells.npz`` (train, codes, test, groups, inner: fold of each
training cell) and ``task.json`` (classes, columns, seed); the peer writes ``told.npz`` and ``told.json`` there.
"""

import json
import os
import sys

import numpy as np
from scipy import sparse


class Task:
    """rows: CSR [n_cells, n_columns]; classes: names; codes: of the training cells; test: the cells to tell."""

    def __init__(self, folder):
        self.folder = folder
        with open(os.path.join(folder, "task.json")) as file:
            told = json.load(file)
        self.classes, self.columns, self.seed = told["classes"], told["columns"], told["seed"]
        with np.load(os.path.join(folder, "rows.npz")) as arrays:
            parts = (arrays["data"], arrays["indices"], arrays["indptr"])
            self.rows = sparse.csr_matrix(parts, shape=tuple(arrays["shape"]))
        with np.load(os.path.join(folder, "cells.npz")) as arrays:
            self.train, self.codes, self.test = arrays["train"], arrays["codes"], arrays["test"]
            self.groups, self.inner = arrays["groups"], arrays["inner"]

    def tuned(self, grid, fit_and_tell):
        """Run the member of the grid that is best in macro F1 on the first inner fold of the training cells.

        fit_and_tell: (options, train cells, codes, cells to tell) -> codes of these.
        Returns codes of the test cells, and the options as text.
        """
        best = grid[0]
        if len(grid) > 1:
            fit, asked = self.inner != 0, self.inner == 0
            scores = []
            for options in grid:
                told = fit_and_tell(options, self.train[fit], self.codes[fit], self.train[asked])
                scores.append(macro_f1(self.codes[asked], np.asarray(told)))
            best = grid[int(np.argmax(scores))]
        told = fit_and_tell(best, self.train, self.codes, self.test)
        chosen = ", ".join(f"{key} {value}" for key, value in sorted(best.items())) or "as it comes"
        return np.asarray(told, np.int64), chosen

    def write(self, codes, chosen):
        np.savez(os.path.join(self.folder, "told.npz"), codes=np.asarray(codes, np.int64))
        with open(os.path.join(self.folder, "told.json"), "w") as file:
            json.dump({"chosen": chosen}, file)


def macro_f1(truth, told):
    scores = []
    for code in np.unique(truth):
        right = np.sum((truth == code) & (told == code))
        scores.append(2.0 * right / (np.sum(truth == code) + np.sum(told == code)))
    return float(np.mean(scores))


def log_normal(rows, total=1e4):
    """log1p of counts scaled to a total of each cell."""
    depth = np.maximum(np.asarray(rows.sum(axis=1)).ravel(), 1)
    return sparse.csr_matrix(sparse.diags(total / depth).dot(rows.astype(np.float64))).log1p()


def run(grid, fit_and_tell_of):
    """The main of a peer. fit_and_tell_of: task -> fit_and_tell."""
    task = Task(sys.argv[1])
    task.write(*task.tuned(grid, fit_and_tell_of(task)))
