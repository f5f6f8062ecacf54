"""The linear probe: logistic regression on the frozen vectors of some cells, its strength by cross-validation.

With few labels it stands in for training: on ten cells a type, fine-tuning the pooled layer was 8 to 17 points of macro
F1 below it (docs/accuracy.md), and one val cell a type is a poor judge. So no cell is set aside to choose the strength
or the temperature: each training cell is judged by a fit that did not see it, out of fold.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from annatac_scale.errors import InputError

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""C of the regression: the weight of a cell's loss beside that of half the squared weights."""
FOLDS = 5
IN_ALL = -1
"""The fold of a cell that every fit sees."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Texts = NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class Linear:
    """logits = weight . (z - centre) / |z - centre| + bias.

    centre: [M]; weight: [Y, M]; bias: [Y]
    """

    centre: Floats
    weight: Floats
    bias: Floats

    def logits(self, vectors: Floats) -> Floats:
        """[n, Y] of vectors [n, M]."""
        return directions(vectors, self.centre) @ self.weight.T + self.bias


@dataclass(frozen=True, eq=False)
class Probe:
    """What was fitted, and how it does on cells that it did not see.

    linear: fitted on all training cells; strength: the chosen C; losses: by C, the weighted out-of-fold log loss
    judged: bool [n], the training cells that were held out once; logits: [judged, Y], out of fold
    """

    linear: Linear
    strength: float
    losses: dict[float, float]
    judged: NDArray[np.bool_]
    logits: Floats


@dataclass(frozen=True, eq=False)
class Folds:
    """Which fold holds out each training cell, IN_ALL for none. by_group: whether groups are kept whole"""

    number: Ints
    by_group: bool

    @property
    def n(self) -> int:
        """How many there are."""
        return len(set(self.number.tolist()) - {IN_ALL})


def deal_folds(codes: Ints, groups: Texts | None, seed: int) -> Folds:
    """Deal training cells to FOLDS folds, so that each fit sees all types.

    Whole groups where there are groups and the rest has all types of each; else cell by cell, type after type, so that
    the folds have the same share of each. A type's only cell is in all fits, and judged by none.

    codes: int64 [n], types; groups: object [n] or None. Raises InputError where fewer than two types have two cells.
    """
    counts = np.bincount(codes)
    if (counts >= 2).sum() < 2:
        raise InputError(
            f"the linear probe: found {(counts >= 2).sum()} types with two training cells or more, expected at least 2 "
            "to cross-validate; label more cells or hold out fewer"
        )
    generator = np.random.default_rng(seed)
    if groups is not None:
        names = generator.permutation(sorted(set(groups)))
        fold_of = {name: number % FOLDS for number, name in enumerate(names)}
        number = np.array([fold_of[name] for name in groups], np.int64)
        if len(names) > 1 and all(_has_all(codes[number != fold], counts) for fold in set(number.tolist())):
            return Folds(number, by_group=True)
    order = generator.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    order = order[counts[codes[order]] >= 2]
    number = np.full(len(codes), IN_ALL, np.int64)
    number[order] = np.arange(len(order)) % FOLDS
    return Folds(number, by_group=False)


def _has_all(codes: Ints, counts: Ints) -> bool:
    return len(set(codes.tolist())) == int((counts > 0).sum())


def fit_probe(
    vectors: NDArray[np.floating], codes: Ints, weights: NDArray[np.floating], folds: Folds
) -> Probe:
    """Fit on all cells with the C that has the least log loss out of fold; of equal ones the smallest.

    vectors: float [n, M]; codes: int64 [n], 0 to Y - 1, each there; weights: [n], of each cell's loss
    The log loss, not macro F1, which of few cells jumps by whole cells.
    """
    z = np.asarray(vectors, np.float64)
    judged = folds.number != IN_ALL
    found: dict[float, Floats] = {}
    losses: dict[float, float] = {}
    for strength in STRENGTHS:
        logits = np.zeros((len(z), int(codes.max()) + 1))
        for fold in range(folds.n):
            out = folds.number == fold
            logits[out] = fit_linear(z[~out], codes[~out], weights[~out], strength).logits(z[out])
        found[strength] = logits[judged]
        own = log_softmax(found[strength], axis=1)[np.arange(judged.sum()), codes[judged]]
        losses[strength] = float(-np.average(own, weights=weights[judged]))
    best = min(losses, key=lambda strength: losses[strength])
    return Probe(fit_linear(z, codes, weights, best), best, losses, judged, found[best])


def fit_linear(vectors: Floats, codes: Ints, weights: NDArray[np.floating], strength: float) -> Linear:
    """L2-regularised multinomial regression on the directions from the mean cell; arguments as for ``fit_probe``."""
    centre = vectors.mean(axis=0)
    model = LogisticRegression(C=strength, tol=1e-6, max_iter=5000)
    model.fit(directions(vectors, centre), codes, sample_weight=weights)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # of two types, scikit-learn gives the log odds of the second
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return Linear(centre, weight, bias)


def directions(vectors: Floats, centre: Floats) -> Floats:
    """Rows of length 1 from ``centre`` on, as the linear head makes them; zero for the centre itself."""
    moved = vectors - centre
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
