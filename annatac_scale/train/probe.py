"""The linear head's fit: two logistic regressions, on a cell's frozen vector and on its islands, averaged.

They err differently: the vector knows which islands go together in the unlabelled cells, the other knows each island on
its own. The mean of their logits was mostly better than either, and than the pooled layer trained whole, on the sets of
benchmarks/accuracy/PROTOCOL.md. Weights of the two that were fitted out of fold did worse on donors and libraries that
nobody had seen. No cell is set aside to choose the strengths or the temperature: each training cell is judged by a fit
that did not see it, out of fold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from annatac_scale.errors import InputError
from annatac_scale.progress import Progress, Silent

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""C of the regression on directions: the weight of a cell's loss beside that of half the squared weights."""
ISLAND_STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""The same on islands, in rows of length ROW_NORM."""
ROW_NORM = 20.0
TOLERANCE, MOST_ITERATIONS = 1e-5, 1000
"""Where a fit ends: largest entry of the gradient of the mean loss, and steps at most."""
JITTER = 1e-10
FOLDS = 5
IN_ALL = -1
"""The fold of a cell that every fit sees."""
DENSE_IS_FASTER = 10
"""Entries of a dense matrix that are multiplied in the time that one of a sparse one takes."""
KEPT_BY_FIT = 8
"""Entries of a dense matrix, of which there are three, in the memory that a fit on islands takes for each weight."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Texts = NDArray[np.object_]
Rows: TypeAlias = Floats | sparse.csr_array


@dataclass(frozen=True, eq=False)
class Linear:
    """logits = x @ weight.T + bias of rows x. weight: [Y, M]; bias: [Y]"""

    weight: Floats
    bias: Floats

    def logits(self, x: Rows) -> Floats:
        """[n, Y] of rows [n, M]."""
        found: Floats = x @ self.weight.T + self.bias
        return found


@dataclass(frozen=True, eq=False)
class Regression:
    """One regression, fitted on all training cells.

    strength: the chosen C; losses: by C, the weighted out-of-fold log loss
    logits: [n, Y], out of fold, 0 for the cells that every fit sees
    """

    linear: Linear
    strength: float
    losses: dict[float, float]
    logits: Floats


@dataclass(frozen=True, eq=False)
class Probe:
    """What was fitted, and how it does on cells that it did not see.

    centre: [M], the mean vector
    vectors, islands: the regressions, on directions from there and on unit rows; of the latter there may be none
    judged: bool [n], the training cells that were held out once; logits: [judged, Y], out of fold
    """

    centre: Floats
    vectors: Regression
    islands: Regression | None
    judged: NDArray[np.bool_]
    logits: Floats

    @property
    def regressions(self) -> dict[str, Regression]:
        """Those that are averaged, by name."""
        found = {"vectors": self.vectors}
        return found if self.islands is None else {**found, "islands": self.islands}

    @property
    def weight(self) -> Floats:
        """Of directions in the mean, [Y, M]."""
        return self.vectors.linear.weight / len(self.regressions)

    @property
    def bias(self) -> Floats:
        """Of the mean, [Y]."""
        return np.mean([one.linear.bias for one in self.regressions.values()], axis=0)

    @property
    def per_island(self) -> Floats | None:
        """Of unit rows of islands in the mean, [N, Y]."""
        return None if self.islands is None else self.islands.linear.weight.T / len(self.regressions)


@dataclass(frozen=True, eq=False)
class Folds:
    """Which fold holds out each training cell, IN_ALL for none. by_group: whether groups are kept whole"""

    number: Ints
    by_group: bool

    @property
    def n(self) -> int:
        """How many there are."""
        return len(set(self.number.tolist()) - {IN_ALL})

    @property
    def judged(self) -> NDArray[np.bool_]:
        """The cells that are held out once, bool [n]."""
        return self.number != IN_ALL


def deal_folds(codes: Ints, groups: Texts | None, seed: int) -> Folds:
    """Deal training cells to FOLDS folds, so that each fit sees all types.

    Whole groups where at least two can be spared and no fold has more than half of the cells, so that each fit has
    about as many as the last one has: a group that alone has a type is in all fits, and judged by none. Else cell by
    cell, type after type, so that the folds have the same share of each; then a type's only cell is in all fits.

    codes: int64 [n], types; groups: object [n] or None. Raises InputError where fewer than two types have two cells.
    """
    counts = np.bincount(codes)
    if (counts >= 2).sum() < 2:
        raise InputError(
            f"the linear head: found {(counts >= 2).sum()} types with two training cells or more, expected at least 2 "
            "to cross-validate; label more cells or hold out fewer"
        )
    generator = np.random.default_rng(seed)
    if groups is not None:
        number = _whole_groups(codes, groups, generator)
        in_fold = [number == fold for fold in range(FOLDS)]
        enough = all(2 * own.sum() <= len(codes) and _has_all(codes[~own], counts) for own in in_fold)
        if enough and len(set(number.tolist()) - {IN_ALL}) > 1:
            return Folds(number, by_group=True)
    order = generator.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    order = order[counts[codes[order]] >= 2]
    number = np.full(len(codes), IN_ALL, np.int64)
    number[order] = np.arange(len(order)) % FOLDS
    return Folds(number, by_group=False)


def _whole_groups(codes: Ints, groups: Texts, generator: np.random.Generator) -> Ints:
    """The fold of each cell: groups that can be spared, the largest first, each to the fold with the fewest cells."""
    counts = np.bincount(codes)
    names = generator.permutation(sorted(set(groups)))
    spared = [name for name in names if _has_all(codes[groups != name], counts)]
    number = np.full(len(codes), IN_ALL, np.int64)
    sizes = np.zeros(FOLDS, np.int64)
    for name in sorted(spared, key=lambda name: -(groups == name).sum()):
        number[groups == name] = sizes.argmin()
        sizes[sizes.argmin()] += (groups == name).sum()
    return number


def _has_all(codes: Ints, counts: Ints) -> bool:
    return len(set(codes.tolist())) == int((counts > 0).sum())


def fit_probe(
    vectors: NDArray[np.floating],
    islands: sparse.csr_array | None,
    codes: Ints,
    weights: NDArray[np.floating],
    folds: Folds,
    progress: Progress | None = None,
) -> Probe:
    """Fit on all cells, each regression with the C that has the least log loss out of fold; of equal ones the smallest.

    vectors: float [n, M]; islands: [n, N], unit rows, or None, as where no island is open, for the vectors alone
    codes: int64 [n], 0 to Y - 1, each there; weights: [n], of each cell's loss
    The log loss, not macro F1, which of few cells jumps by whole cells. Takes some 40 bytes for each open island of
    these cells, and 200 for each island and type or, where cells have many open islands, 24 for each pair of cells.
    """
    z = np.asarray(vectors, np.float64)
    centre = z.mean(axis=0)
    fitted = [
        _chosen("vectors", directions(z, centre), STRENGTHS, codes, weights, folds, progress or Silent())
    ]
    if islands is not None and islands.nnz:
        fitted.append(_of_islands(islands, codes, weights, folds, progress or Silent()))
    logits = np.mean([one.logits for one in fitted], axis=0)[folds.judged]
    return Probe(centre, fitted[0], fitted[1] if len(fitted) > 1 else None, folds.judged, logits)


def _of_islands(
    rows: sparse.csr_array, codes: Ints, weights: NDArray[np.floating], folds: Folds, progress: Progress
) -> Regression:
    """The regression on unit rows, fitted in coordinates that are quick to fit in."""
    seen = np.flatnonzero(np.bincount(rows.indices, minlength=rows.shape[1]))
    x = (rows[:, seen] * ROW_NORM).astype(np.float64)
    n_types = int(codes.max()) + 1
    if len(codes) ** 2 < max(DENSE_IS_FASTER * x.nnz, KEPT_BY_FIT * n_types * x.shape[1]):
        coordinates = spanned(x)
        found = _chosen("islands", coordinates, ISLAND_STRENGTHS, codes, weights, folds, progress)
        of_cells = linalg.solve_triangular(coordinates, found.linear.weight.T, lower=True, trans="T")
        of_seen = (x.T @ of_cells).T
    else:
        found = _chosen("islands", x, ISLAND_STRENGTHS, codes, weights, folds, progress)
        of_seen = found.linear.weight
    weight = np.zeros((len(of_seen), rows.shape[1]))
    weight[:, seen] = of_seen * ROW_NORM
    return Regression(Linear(weight, found.linear.bias), found.strength, found.losses, found.logits)


def spanned(x: sparse.csr_array) -> Floats:
    """Rows [n, N] in coordinates of their own span, [n, n]: L, lower triangular, of x @ x.T = L @ L.T.

    L2-regularised fits are the same in both, and there are far fewer coordinates than islands.
    """
    products = (x @ x.T).toarray()
    # So that rows which depend on each other have a factor too; what it adds weighs nothing.
    products[np.diag_indices_from(products)] += JITTER * products.diagonal().mean()
    coordinates: Floats = linalg.cholesky(products, lower=True, overwrite_a=True, check_finite=False)
    return coordinates


def _chosen(
    name: str,
    x: Rows,
    strengths: Sequence[float],
    codes: Ints,
    weights: NDArray[np.floating],
    folds: Folds,
    progress: Progress,
) -> Regression:
    """The regression of all cells with the C of least loss out of fold."""
    judged = folds.judged
    parts = [(folds.number != fold, folds.number == fold) for fold in range(folds.n)]
    logits = {strength: np.zeros((len(codes), int(codes.max()) + 1)) for strength in strengths}
    with progress.task(f"Fitting {name}", len(strengths) * (len(parts) + 1), "fits") as advance:
        for fitted, out in parts:
            for strength, linear in _path(x[fitted], codes[fitted], weights[fitted], strengths):
                logits[strength][out] = linear.logits(x[out])
                advance(1)
        losses = {
            strength: _loss(logits[strength][judged], codes[judged], weights[judged])
            for strength in strengths
        }
        best = min(losses, key=lambda strength: losses[strength])
        needed = [strength for strength in strengths if strength <= best]
        for _, fit in _path(x, codes, weights, needed):
            linear = fit
            advance(1)
        advance(len(strengths) - len(needed))
    return Regression(linear, best, losses, logits[best])


def _loss(logits: Floats, codes: Ints, weights: NDArray[np.floating]) -> float:
    own = log_softmax(logits, axis=1)[np.arange(len(codes)), codes]
    return float(-np.average(own, weights=weights))


def _path(
    x: Rows, codes: Ints, weights: NDArray[np.floating], strengths: Sequence[float]
) -> Iterator[tuple[float, Linear]]:
    """L2-regularised multinomial regressions, each from where the one before it ended."""
    model = LogisticRegression(tol=TOLERANCE, max_iter=MOST_ITERATIONS, warm_start=True)
    for strength in strengths:
        model.set_params(C=strength).fit(x, codes, sample_weight=weights)
        weight, bias = model.coef_, model.intercept_
        if len(weight) == 1:  # of two types, scikit-learn gives the log odds of the second
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        yield strength, Linear(weight, bias)


def directions(vectors: Floats, centre: Floats) -> Floats:
    """Rows of length 1 from ``centre`` on, as the linear head makes them; zero for the centre itself."""
    moved = vectors - centre
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
