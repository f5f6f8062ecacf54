"""The bar: tuned logistic regression, against the same grid on plain features, and what it may look at."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold

from annatac_scale.baseline import INNER_FOLDS, ROW_NORM, STRENGTHS, Tuned, tuned_logistic_regression

TYPES = np.array(["B cell", "NK", "T cell"])


def draw(n_cells: int, n_islands: int, seed: int = 0) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Cells whose type opens some islands more often, so that types are confused now and then."""
    rng = np.random.default_rng(seed)
    types = TYPES[rng.integers(0, 3, n_cells)]
    own = rng.random((3, n_islands)) < 0.2
    chance = np.where(own[np.searchsorted(TYPES, types)], 0.45, 0.2) * rng.uniform(0.4, 1.6, (n_cells, 1))
    levels = rng.integers(1, 6, (n_cells, n_islands)) * (rng.random((n_cells, n_islands)) < chance)
    return sparse.csr_matrix(levels.astype(np.uint8)), types


def log_values(levels: sparse.csr_matrix, train: np.ndarray) -> np.ndarray:
    """log(1 + level * median depth of the training cells / own depth), written out."""
    dense = levels.toarray().astype(float)
    depth = np.maximum(dense.sum(axis=1), 1)
    return np.log(1 + dense * np.median(depth[train]) / depth[:, None])


def idf_values(levels: sparse.csr_matrix, train: np.ndarray) -> np.ndarray:
    """Binary times log(1 + training cells / those that have it open), rows of one length, written out."""
    opened = (levels.toarray() > 0).astype(float)
    n_open = np.maximum(opened[train].sum(axis=0), 1)
    weighted = opened * np.log(1 + len(train) / n_open)
    return ROW_NORM * weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)


def plainly_tuned(
    levels: sparse.csr_matrix, types: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int
) -> tuple[np.ndarray, Tuned]:
    """The same grid on the features themselves, one island a column."""

    def fit(x: np.ndarray, y: np.ndarray, tuned: Tuned) -> LogisticRegression:
        model = LogisticRegression(C=tuned.strength, class_weight=tuned.class_weight, max_iter=2000)
        return model.fit(sparse.csr_matrix(x), y)

    features = {"log": log_values(levels, train), "idf": idf_values(levels, train)}
    folds = list(StratifiedKFold(INNER_FOLDS, shuffle=True, random_state=seed).split(train, types[train]))
    scores = {}
    for values, x in features.items():
        for strength in STRENGTHS:
            for weight in (None, "balanced"):
                tuned = Tuned(values, strength, weight)
                predicted = np.empty(len(train), object)
                for inner, outer in folds:
                    predicted[outer] = fit(x[train[inner]], types[train[inner]], tuned).predict(
                        x[train[outer]]
                    )
                scores[tuned] = f1_score(types[train], predicted.astype(str), average="macro")
    best = max(scores, key=scores.__getitem__)
    x = features[best.values]
    return fit(x[train], types[train], best).predict(x[test]), best


@pytest.mark.parametrize("n_islands", [40, 400], ids=["fewer islands than cells", "more islands than cells"])
def test_few_rotated_columns_choose_and_predict_what_all_islands_do(n_islands: int) -> None:
    levels, types = draw(120, n_islands)
    train, test = np.arange(90), np.arange(90, 120)
    predicted, tuned = tuned_logistic_regression(levels, types, train, test, seed=3)
    expected, expected_tuned = plainly_tuned(levels, types, train, test, seed=3)
    assert tuned == expected_tuned
    assert predicted.tolist() == expected.tolist()
    assert np.mean(predicted == types[test]) > 0.45


def test_types_of_the_test_cells_are_not_looked_at() -> None:
    levels, types = draw(80, 60)
    train, test = np.arange(0, 80, 2), np.arange(1, 80, 2)
    predicted, tuned = tuned_logistic_regression(levels, types, train, test, 0)
    changed = types.copy()
    changed[test] = np.random.default_rng(1).permutation(types[test])
    again, tuned_again = tuned_logistic_regression(levels, changed, train, test, 0)
    assert tuned_again == tuned
    assert again.tolist() == predicted.tolist()


def test_islands_of_the_test_cells_change_neither_the_choice_nor_other_cells() -> None:
    levels, types = draw(80, 60)
    train, test = np.arange(60), np.arange(60, 80)
    predicted, tuned = tuned_logistic_regression(levels, types, train, test, 0)
    dense = levels.toarray()
    dense[70:] = np.random.default_rng(2).integers(0, 6, (10, 60))
    again, tuned_again = tuned_logistic_regression(sparse.csr_matrix(dense), types, train, test, 0)
    assert tuned_again == tuned
    assert again[:10].tolist() == predicted[:10].tolist()


def test_a_type_of_two_cells_and_a_cell_without_open_islands_are_no_trouble() -> None:
    levels, types = draw(60, 40)
    types = np.where(types == "NK", "T cell", types)
    types[[3, 4]] = "NK"
    dense = levels.toarray()
    dense[[5, 55]] = 0
    levels = sparse.csr_matrix(dense)
    predicted, _ = tuned_logistic_regression(levels, types, np.arange(50), np.arange(50, 60), 0)
    assert len(predicted) == 10
    assert set(predicted) <= set(TYPES)
