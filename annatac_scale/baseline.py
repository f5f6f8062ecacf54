"""The bar: logistic regression on the same islands, its features, C and class weights tuned on the training cells."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold

from annatac_scale.train.probe import spanned

STRENGTHS = (0.003, 0.03, 0.3, 3.0, 30.0)
ROW_NORM = 20.0
"""Length that rows of binary x idf are scaled to, so that one range of C serves both kinds of values."""
INNER_FOLDS = 3


@dataclass(frozen=True)
class Tuned:
    """What tuning chose."""

    values: str
    strength: float
    class_weight: str | None


def tuned_logistic_regression(
    levels: sparse.csr_matrix,
    types: NDArray[np.str_],
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    seed: int,
) -> tuple[NDArray[np.str_], Tuned]:
    """Fit on the ``train`` rows and predict the ``test`` rows.

    levels: uint8 [n_cells, n_islands]; types: [n_cells], those of ``test`` are not looked at
    Values ("log": log1p of depth-normalised levels; "idf": binary x idf, rows of equal length), C and class weights are
    chosen by macro F1 over stratified inner folds of the training cells. Returns the predicted types and the choice.
    For sets of up to some 10,000 cells: memory holds n_cells x n_cells numbers. Two types need two training cells each.
    """
    best: tuple[float, Tuned] | None = None
    n_folds = min(INNER_FOLDS, int(np.unique(types[train], return_counts=True)[1].min()))
    folds = list(StratifiedKFold(max(n_folds, 2), shuffle=True, random_state=seed).split(train, types[train]))
    features = {name: spanned(make(levels, train)) for name, make in {"log": _log, "idf": _idf}.items()}
    for values, x in features.items():
        for strength in STRENGTHS:
            for class_weight in (None, "balanced"):
                tuned = Tuned(values, strength, class_weight)
                predicted = types[train].copy()
                for inner, outer in folds:
                    predicted[outer] = _fit(x, types, train[inner], tuned).predict(x[train[outer]])
                score = f1_score(types[train], predicted, average="macro")
                if best is None or score > best[0]:
                    best = score, tuned
    assert best is not None
    tuned = best[1]
    x = features[tuned.values]
    return _fit(x, types, train, tuned).predict(x[test]), tuned


def _fit(
    x: NDArray[np.float64], types: NDArray[np.str_], rows: NDArray[np.int64], tuned: Tuned
) -> LogisticRegression:
    model = LogisticRegression(C=tuned.strength, class_weight=tuned.class_weight, max_iter=500)
    return model.fit(x[rows], types[rows])


def _log(levels: sparse.csr_matrix, train: NDArray[np.int64]) -> sparse.csr_matrix:
    depth = np.maximum(np.asarray(levels.sum(axis=1, dtype=np.float64)).ravel(), 1)
    scaled = sparse.diags(np.median(depth[train]) / depth) @ levels.astype(np.float64)
    return scaled.log1p()


def _idf(levels: sparse.csr_matrix, train: NDArray[np.int64]) -> sparse.csr_matrix:
    binary = (levels > 0).astype(np.float64)
    open_cells = np.maximum(np.asarray(binary[train].sum(axis=0)).ravel(), 1)
    weighted = binary @ sparse.diags(np.log1p(len(train) / open_cells))
    lengths = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    return sparse.diags(ROW_NORM / np.maximum(lengths, 1e-12)) @ weighted
