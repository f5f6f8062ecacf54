"""How good labels are: figures of one set of cells with known types, all derived from its confusion table."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from annatac_scale.errors import InputError
from annatac_scale.model.labels import label_texts
from annatac_scale.train.confusions import confusion_table, per_type_figures

HEADLINES = ("accuracy", "macro_f1", "kappa", "jaccard_micro", "jaccard_weighted")
"""The figures of an Evaluation that are one number each."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Figures of predicted against true labels; "types" are the labels that occur in the truth.

    n_cells: cells with a truth, over which everything else runs
    n_without_truth: cells that were left out
    accuracy: share of cells whose label is the true one
    macro_f1: mean F1 over the types. A predicted label that no cell truly has (as Novel_cell_type) counts as
        an error of the cell's own type, and forms no class of its own in the mean.
    kappa: Cohen's kappa; NaN where truth and prediction are one and the same single label
    jaccard_micro: right / (right + 2 wrong), over all labels pooled
    jaccard_weighted: mean over the types of TP / (TP + FP + FN), weighted by their true cells
    per_type: one row a type: cell_type, n (true cells), precision (0 if never predicted), recall, f1
    confusion: counts; a row each type, a column each type in the same order, then each other predicted label
    """

    n_cells: int
    n_without_truth: int
    accuracy: float
    macro_f1: float
    kappa: float
    jaccard_micro: float
    jaccard_weighted: float
    per_type: pd.DataFrame
    confusion: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """All figures in the types of JSON; an undefined kappa is None."""
        return {
            "n_cells": self.n_cells,
            "n_without_truth": self.n_without_truth,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "kappa": None if math.isnan(self.kappa) else self.kappa,
            "jaccard_micro": self.jaccard_micro,
            "jaccard_weighted": self.jaccard_weighted,
            "per_type": self.per_type.to_dict("records"),
            "confusion": {
                "truth": self.confusion.index.tolist(),
                "predicted": self.confusion.columns.tolist(),
                "counts": self.confusion.to_numpy().tolist(),
            },
        }


def evaluate_labels(
    truth: ArrayLike, predicted: ArrayLike, n_cells: NDArray[np.int64] | None = None
) -> Evaluation:
    """Compare predicted with true labels, cell by cell, or row by row of a table of counts.

    truth, predicted: labels [n], of text or whole numbers (compared as text). Cells whose truth is missing
    (NaN, None, blank) are left out and counted.
    n_cells: cells that each pair of labels stands for, int64 [n]; None: one each

    Raises InputError if the lengths differ, no cell has a truth, or a cell with a truth has no predicted label.
    """
    true_label, label = label_texts(truth), label_texts(predicted)
    if len(true_label) != len(label):
        raise InputError(
            f"evaluation: found {len(true_label):,} true and {len(label):,} predicted labels; "
            "expected one of each a cell; join the two tables by barcode first"
        )
    known = true_label != ""
    n = np.ones(len(label), np.int64) if n_cells is None else n_cells
    _check_cells(known, label, n)
    return _evaluation(confusion_table(true_label[known], label[known], n[known]), int(n[~known].sum()))


def _check_cells(known: NDArray[np.bool_], label: NDArray[np.object_], n_cells: NDArray[np.int64]) -> None:
    if not known.any():
        raise InputError(
            f"truth: found no label in any of {n_cells.sum():,} cells; expected some; "
            "name the column that holds the types"
        )
    n_blank = int(n_cells[known & (label == "")].sum())
    if n_blank:
        raise InputError(
            f"predicted labels: found none for {n_blank:,} cells; expected one each; predict these cells too"
        )


def figures_of_counts(
    right: NDArray[np.integer],
    n_true: NDArray[np.integer],
    n_predicted: NDArray[np.integer],
    n_cells: ArrayLike,
) -> dict[str, NDArray[np.float64]]:
    """accuracy, macro_f1, kappa, jaccard_micro and jaccard_weighted of one table of counts, or of many at once.

    right: cells of a type that are given it, [..., types]; n_true: cells of the type; n_predicted: cells given it;
    n_cells: of all tables, or of each [...]; above 0. Types without true cells count in no mean. Each figure is
    float64 [...].
    """
    n_cells = np.asarray(n_cells)
    n = n_cells[..., None]
    n_right = right.sum(axis=-1)
    accuracy = n_right / n_cells
    by_chance = (n_true / n * (n_predicted / n)).sum(axis=-1)
    f1 = np.where(n_true > 0, 2 * right / np.maximum(n_true + n_predicted, 1), 0)
    jaccard = right / np.maximum(n_true + n_predicted - right, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        kappa = np.where(by_chance < 1, (accuracy - by_chance) / (1 - by_chance), np.nan)
    return {
        "accuracy": accuracy,
        "macro_f1": f1.sum(axis=-1) / (n_true > 0).sum(axis=-1),
        "kappa": kappa,
        "jaccard_micro": n_right / (2 * n_cells - n_right),
        "jaccard_weighted": (jaccard * n_true).sum(axis=-1) / n_cells,
    }


def _evaluation(confusion: pd.DataFrame, n_without_truth: int) -> Evaluation:
    counts = confusion.to_numpy()
    n, n_true = int(counts.sum()), counts.sum(axis=1)
    n_predicted = counts.sum(axis=0)[: len(counts)]
    right = counts.diagonal()
    figures = figures_of_counts(right, n_true, n_predicted, n)
    return Evaluation(
        n_cells=n,
        n_without_truth=n_without_truth,
        per_type=per_type_figures(confusion),
        confusion=confusion,
        **{name: float(value) for name, value in figures.items()},
    )
