"""The linear bars, tuned: logistic regression on the islands and on SVDs of them, and nearest neighbours in those.

The tuning is that of ``annatac_scale.baseline`` (its values, grid and folds), computed on sparse rows where there are
too many cells for its n_cells x n_cells numbers, and with C widened tenfold as long as the best one is at an edge.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier

from annatac_scale.baseline import INNER_FOLDS, ROW_NORM, STRENGTHS, Tuned
from annatac_scale.train.probe import spanned

SMALLEST_STRENGTH, LARGEST_STRENGTH = 3e-6, 3e4
MOST_ROTATED = 2_000
"""Cells up to which rows are rotated into their own span: the same fits, faster."""
RANK = 64
NEIGHBOURS = (5, 10, 20, 50)

Ints = NDArray[np.int64]
Texts = NDArray[np.str_]
Rows = Any
"""A sparse matrix or float64 array, [n_cells, channels]."""
Maker = Callable[[Ints], Rows]
"""Rows of all cells, whatever is fitted for them fitted on the given ones."""


@dataclass(frozen=True, eq=False)
class Predicted:
    """Types of the test cells, and what tuning chose.

    chances: [n_test, n_classes] of the ``classes``; None where a method gives none
    """

    types: Texts
    tuned: Tuned
    chances: NDArray[np.float64] | None = None
    classes: tuple[str, ...] = ()


def regression(
    levels: sparse.csr_matrix,
    types: Texts,
    train: Ints,
    test: Ints,
    values: Sequence[str] = ("log", "idf"),
) -> Predicted:
    """Logistic regression on the islands.

    levels: uint8 [n_cells, n_islands]; types: [n_cells]; values: names of ROWS, one of which is chosen
    """
    rows = {name: ROWS[name](levels, train) for name in values}
    if levels.shape[0] <= MOST_ROTATED:
        rows = {name: spanned(x) for name, x in rows.items()}
    return tuned_on({name: constant(x) for name, x in rows.items()}, types, train, test)


def svd_regression(
    levels: sparse.csr_matrix,
    types: Texts,
    train: Ints,
    test: Ints,
    values: Iterable[str] = ("log", "idf", "log-tf-idf"),
    strengths: Iterable[float] = STRENGTHS,
) -> Predicted:
    """Logistic regression on an SVD of the training cells; which values, and which scale, is tuned as well.

    Inner folds have an SVD of their own: cells that it was fitted on look otherwise than cells that it was not.
    """
    return tuned_on(svd_rows(levels, values), types, train, test, strengths)


def svd_rows(
    levels: sparse.csr_matrix, values: Iterable[str], unlabelled: Ints | None = None
) -> dict[str, Maker]:
    """Makers of components, scaled, by name of values and scale.

    unlabelled: cells that the SVD is fitted on beside those that each maker is given. No labelled cell may be among
        them: those of an inner fold that chooses would lie in the components as no cell does that is told of, and
        scales would be chosen that only such cells suit.
    """

    def cells(fitted: Ints) -> Ints:
        return fitted if unlabelled is None else np.union1d(fitted, unlabelled)

    def scaled(fitted: Ints, components: Maker, scale: str) -> NDArray[np.float64]:
        return SCALES[scale](components(fitted), cells(fitted))

    makers = {
        name: _remembered(lambda fitted, name=name: svd(levels, cells(fitted), 0, name)) for name in values
    }
    return {
        f"{name}, {scale}": partial(scaled, components=makers[name], scale=scale)
        for name in makers
        for scale in SCALES
    }


def _remembered(make: Maker) -> Maker:
    """The maker, which makes the rows of the same cells once: of several scales, of the folds."""
    made: dict[bytes, Rows] = {}

    def remembered(fitted: Ints) -> Rows:
        key = fitted.tobytes()
        if key not in made:
            made[key] = make(fitted)
        return made[key]

    return remembered


def neighbours(rows: Mapping[str, Maker], types: Texts, train: Ints, test: Ints) -> Predicted:
    """Nearest neighbours; rows, their number and weights chosen by macro F1 over the inner folds."""
    folds = inner_folds(types[train])
    scores: dict[tuple[str, int, str], float] = {}
    for name, make in rows.items():
        inner_rows = [make(train[inner]) for inner, _ in folds]
        for k in NEIGHBOURS:
            for weights in ("uniform", "distance"):
                predicted = types[train].copy()
                for x, (inner, outer) in zip(inner_rows, folds, strict=True):
                    model = KNeighborsClassifier(min(k, len(inner)), weights=weights)
                    model.fit(x[train[inner]], types[train[inner]])
                    predicted[outer] = model.predict(x[train[outer]])
                scores[name, k, weights] = float(f1_score(types[train], predicted, average="macro"))
    name, k, weights = max(scores, key=lambda one: scores[one])
    x = rows[name](train)
    model = KNeighborsClassifier(min(k, len(train)), weights=weights).fit(x[train], types[train])
    chosen = Tuned(f"{name}, {k} neighbours, {weights}", 0.0, None)
    return Predicted(model.predict(x[test]), chosen, model.predict_proba(x[test]), tuple(model.classes_))


def tuned_on(
    rows: Mapping[str, Maker], types: Texts, train: Ints, test: Ints, strengths: Iterable[float] = STRENGTHS
) -> Predicted:
    """Choose rows, C and class weights by macro F1 over inner folds of the training cells; fit on all of these."""
    folds = inner_folds(types[train])
    scores: dict[Tuned, float] = {}
    made = {name: [make(train[inner]) for inner, _ in folds] for name, make in rows.items()}
    tried: list[float] = []
    new = sorted(strengths)
    while new:
        for name, inner_rows in made.items():
            for strength in new:
                for weight in (None, "balanced"):
                    tuned = Tuned(name, strength, weight)
                    scores[tuned] = _score(inner_rows, types, train, folds, tuned)
        tried = sorted([*tried, *new])
        # On ties the first tried, as in annatac_scale.baseline.
        best = max(scores, key=lambda tuned: scores[tuned])
        new = _beyond(best.strength, tried)
    x = rows[best.values](train)
    model = _fit(x, types, train, best)
    return Predicted(model.predict(x[test]), best, model.predict_proba(x[test]), tuple(model.classes_))


def _beyond(best: float, tried: list[float]) -> list[float]:
    """The next C to try, where the best is at an edge."""
    if best == tried[0] and best > SMALLEST_STRENGTH:
        return [best / 10]
    if best == tried[-1] and best < LARGEST_STRENGTH:
        return [best * 10]
    return []


def inner_folds(types: Texts) -> list[tuple[Ints, Ints]]:
    """Positions in the training cells to fit on and to choose by. types: of the training cells alone."""
    n_folds = min(INNER_FOLDS, int(np.unique(types, return_counts=True)[1].min()))
    return list(StratifiedKFold(max(n_folds, 2), shuffle=True, random_state=0).split(types, types))


def _score(
    rows: list[Rows], types: Texts, train: Ints, folds: list[tuple[Ints, Ints]], tuned: Tuned
) -> float:
    predicted = types[train].copy()
    for x, (inner, outer) in zip(rows, folds, strict=True):
        predicted[outer] = _fit(x, types, train[inner], tuned).predict(x[train[outer]])
    return float(f1_score(types[train], predicted, average="macro"))


def _fit(x: Rows, types: Texts, rows: Ints, tuned: Tuned) -> LogisticRegression:
    model = LogisticRegression(C=tuned.strength, class_weight=tuned.class_weight, max_iter=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x[rows], types[rows])


def log_rows(levels: sparse.csr_matrix, train: Ints) -> sparse.csr_matrix:
    """log1p of levels, each cell scaled to the median depth of the training cells."""
    depth = np.maximum(np.asarray(levels.sum(axis=1, dtype=np.float64)).ravel(), 1)
    return sparse.csr_matrix(
        sparse.diags(np.median(depth[train]) / depth) @ levels.astype(np.float64)
    ).log1p()


def binary_rows(levels: sparse.csr_matrix, fitted: Ints) -> sparse.csr_matrix:
    """1 where an island is open."""
    return sparse.csr_matrix((levels > 0).astype(np.float64))


def idf_rows(levels: sparse.csr_matrix, fitted: Ints, norm: float = ROW_NORM) -> sparse.csr_matrix:
    """binary x idf of the cells ``fitted``, rows of one length."""
    binary = (levels > 0).astype(np.float64)
    open_cells = np.maximum(np.asarray(binary[fitted].sum(axis=0)).ravel(), 1)
    weighted = binary @ sparse.diags(np.log1p(len(fitted) / open_cells))
    lengths = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    return sparse.csr_matrix(sparse.diags(norm / np.maximum(lengths, 1e-12)) @ weighted)


def log_tf_idf_rows(levels: sparse.csr_matrix, fitted: Ints) -> sparse.csr_matrix:
    """log1p of 10,000 x share of the cell's open islands x cells / cells in which it is open (as in Signac)."""
    binary = (levels > 0).astype(np.float64)
    open_cells = np.maximum(np.asarray(binary[fitted].sum(axis=0)).ravel(), 1)
    depth = np.maximum(np.asarray(binary.sum(axis=1)).ravel(), 1)
    return sparse.csr_matrix(
        sparse.diags(1e4 / depth) @ binary @ sparse.diags(len(fitted) / open_cells)
    ).log1p()


def svd(levels: sparse.csr_matrix, fitted: Ints, seed: int, values: str) -> NDArray[np.float64]:
    """All cells in the leading components of the cells ``fitted``, [n_cells, RANK]; ``values``: one of VALUES."""
    rows = VALUES[values](levels, fitted)
    fit = TruncatedSVD(min(RANK, len(fitted) - 1), n_iter=7, random_state=seed).fit(rows[fitted])
    components: NDArray[np.float64] = fit.transform(rows)
    return components


def unit_rows(z: NDArray[np.floating], fitted: Ints) -> NDArray[np.float64]:
    """Rows standardised each for itself (LayerNorm), centred on the cells ``fitted``, and scaled to length 1.

    z: [n_cells, channels]
    """
    z = np.asarray(z, np.float64)
    z = (z - z.mean(axis=1, keepdims=True)) / np.maximum(z.std(axis=1, keepdims=True), 1e-12)
    z = z - z[fitted].mean(axis=0)
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def standard_rows(z: NDArray[np.floating], fitted: Ints) -> NDArray[np.float64]:
    """Columns with mean 0 and variance 1 over the cells ``fitted``, all over the square root of their number."""
    z = np.asarray(z, np.float64)
    spread = np.maximum(z[fitted].std(axis=0), 1e-12)
    return (z - z[fitted].mean(axis=0)) / spread / z.shape[1] ** 0.5


ROWS: Mapping[str, Callable[[sparse.csr_matrix, Ints], Rows]] = {
    "log": log_rows,
    "binary": binary_rows,
    "log-tf-idf": log_tf_idf_rows,
    "idf": idf_rows,
}
"""Values that logistic regression reads."""
VALUES: Mapping[str, Callable[[sparse.csr_matrix, Ints], Rows]] = {
    "log": log_rows,
    "idf": partial(idf_rows, norm=1.0),
    "log-tf-idf": log_tf_idf_rows,
}
SCALES = {"unit": unit_rows, "standard": standard_rows}


def constant(x: Rows) -> Maker:
    """Rows that are what they are, whatever the cells."""
    return lambda _: x
