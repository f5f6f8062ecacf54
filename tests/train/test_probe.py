import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp
from sklearn.linear_model import LogisticRegression

from annatac_scale.errors import InputError
from annatac_scale.train import probe as probe_module
from annatac_scale.train.probe import (
    FOLDS,
    IN_ALL,
    ISLAND_STRENGTHS,
    ROW_NORM,
    STRENGTHS,
    deal_folds,
    directions,
    fit_probe,
    spanned,
)


def drawn(n, n_types=3, seed=0, spread=1.5):
    """Vectors around a centre a type, types and weights."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % n_types
    vectors = 3 + rng.normal(size=(n_types, 6))[codes] + spread * rng.normal(size=(n, 6))
    return vectors, codes, rng.uniform(0.5, 2, n)


def drawn_islands(codes, seed=0, n_islands=30):
    """Unit rows of which a third of the islands is rather a type's own; the last one is open in no cell."""
    rng = np.random.default_rng(seed)
    own = (np.arange(n_islands) % 3)[None] == codes[:, None]
    open_islands = rng.random((len(codes), n_islands)) < np.where(own, 0.5, 0.2)
    open_islands[:, 0], open_islands[:, -1] = True, False
    rows = open_islands * rng.uniform(0.5, 3, n_islands)
    return sparse.csr_array((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


def objective(x, codes, weights, strength, weight, bias):
    logits = x @ weight.T + bias
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(x)), codes]
    return strength * (weights * losses).sum() + 0.5 * (weight**2).sum()


def minimum(x, codes, weights, strength):
    """Weights and biases where the objective is least, found without scikit-learn."""
    n_types, n = codes.max() + 1, x.shape[1]
    size = n_types * n

    def loss(flat):
        return objective(x, codes, weights, strength, flat[:size].reshape(n_types, n), flat[size:])

    found = minimize(loss, np.zeros(size + n_types), method="BFGS", options={"gtol": 1e-6}).x
    return found[:size].reshape(n_types, n), found[size:]


def test_each_regression_is_the_minimum_of_its_objective():
    vectors, codes, weights = drawn(60)
    rows = drawn_islands(codes, n_islands=8)
    probe = fit_probe(vectors, rows, codes, weights, deal_folds(codes, None, 0))
    x = vectors - vectors.mean(0)
    x /= np.sqrt((x**2).sum(1, keepdims=True))
    for found, on, scale in ((probe.vectors, x, 1.0), (probe.islands, rows.toarray(), ROW_NORM)):
        weight, bias = minimum(on.astype(float) * scale, codes, weights, found.strength)
        expected = on * scale @ weight.T + bias
        logits = found.linear.logits(on)
        np.testing.assert_allclose(
            log_softmax(logits, axis=1), log_softmax(expected, axis=1), atol=5e-3, rtol=5e-3
        )


def test_the_probe_is_the_mean_of_both_in_one_linear_function():
    vectors, codes, weights = drawn(45)
    rows = drawn_islands(codes)
    folds = deal_folds(codes, None, 0)
    probe = fit_probe(vectors, rows, codes, weights, folds)
    together = directions(vectors, probe.centre) @ probe.weight.T + rows @ probe.per_island + probe.bias
    of_vectors = probe.vectors.linear.logits(directions(vectors, vectors.mean(0)))
    np.testing.assert_allclose(together, (of_vectors + probe.islands.linear.logits(rows)) / 2)
    np.testing.assert_allclose(probe.logits, (probe.vectors.logits + probe.islands.logits) / 2)
    assert (probe.per_island[-1] == 0).all()
    nothing_open = sparse.csr_array(rows.shape, dtype=np.float32)
    assert fit_probe(vectors, nothing_open, codes, weights, folds).islands is None
    alone = fit_probe(vectors, None, codes, weights, folds)
    assert (alone.islands, alone.per_island) == (None, None)
    np.testing.assert_array_equal(alone.weight, probe.vectors.linear.weight)
    np.testing.assert_array_equal(alone.bias, probe.vectors.linear.bias)


def test_of_two_types_the_probabilities_are_those_of_the_logistic_function():
    vectors, codes, weights = drawn(40, n_types=2)
    probe = fit_probe(vectors, None, codes, weights, deal_folds(codes, None, 0))
    x = directions(vectors, vectors.mean(0))
    logits = probe.vectors.linear.logits(x)

    def loss(flat):
        score = x @ flat[:6] + flat[6]
        signed = np.where(codes == 1, score, -score)
        return (
            probe.vectors.strength * (weights * np.log1p(np.exp(-signed))).sum() + 0.5 * (flat[:6] ** 2).sum()
        )

    found = minimize(loss, np.zeros(7), method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], x @ found.x[:6] + found.x[6], atol=1e-2)


def test_each_cell_is_judged_by_fits_that_did_not_see_it_at_the_strengths_of_least_loss():
    vectors, codes, weights = drawn(45)
    rows = drawn_islands(codes)
    folds = deal_folds(codes, None, 0)
    probe = fit_probe(vectors, rows, codes, weights, folds)
    x = directions(vectors, vectors.mean(0))
    for found, on, strengths in (
        (probe.vectors, x, STRENGTHS),
        (probe.islands, rows.toarray() * ROW_NORM, ISLAND_STRENGTHS),
    ):
        losses = {}
        for strength in strengths:
            by_hand = np.empty((45, 3))
            for cell in range(45):
                others = folds.number != folds.number[cell]
                bar = LogisticRegression(C=strength, tol=1e-7, max_iter=9999)
                bar.fit(on[others], codes[others], sample_weight=weights[others])
                by_hand[cell] = bar.decision_function(on[cell : cell + 1])[0]
            own = log_softmax(by_hand, axis=1)[np.arange(45), codes]
            losses[strength] = -(own * weights).sum() / weights.sum()
            if strength == found.strength:
                np.testing.assert_allclose(found.logits, by_hand, rtol=2e-2, atol=2e-2)
        assert found.losses == pytest.approx(losses, rel=1e-3)
        assert found.strength == min(found.losses, key=found.losses.get)


def test_many_cells_are_fitted_as_few_are(monkeypatch):
    """In the coordinates of their span, or on the islands themselves."""
    vectors, codes, weights = drawn(60)
    rows = drawn_islands(codes)
    folds = deal_folds(codes, None, 0)
    spanned = fit_probe(vectors, rows, codes, weights, folds).islands
    monkeypatch.setattr(probe_module, "DENSE_IS_FASTER", 0)
    monkeypatch.setattr(probe_module, "KEPT_BY_FIT", 0)
    plain = fit_probe(vectors, rows, codes, weights, folds).islands
    assert plain.strength == spanned.strength
    assert plain.losses == pytest.approx(spanned.losses, rel=1e-3)
    np.testing.assert_allclose(plain.linear.weight, spanned.linear.weight, atol=2e-2 * ROW_NORM)
    np.testing.assert_allclose(plain.logits, spanned.logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("repeated", [False, True])
def test_coordinates_have_the_products_of_the_rows_also_where_cells_are_the_same(repeated):
    rows = drawn_islands(np.arange(20) % 3, n_islands=40).astype(float)
    if repeated:
        rows = sparse.csr_array(sparse.vstack([rows, rows[:5]]))
    coordinates = spanned(rows)
    np.testing.assert_allclose(coordinates @ coordinates.T, (rows @ rows.T).toarray(), atol=1e-9)


def test_noise_asks_for_less_strength_than_signal():
    """Where types cannot be told the smallest C is best, where they are far apart a large one."""
    strengths = []
    for spread in (0.05, 50.0):
        vectors, codes, weights = drawn(60, spread=spread)
        probe = fit_probe(vectors, None, codes, weights, deal_folds(codes, None, 0))
        strengths.append(probe.vectors.strength)
    assert strengths[0] == STRENGTHS[-1]
    assert strengths[1] == STRENGTHS[0]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 3))
def test_every_fit_sees_all_types_and_every_cell_that_can_be_is_held_out_once(drawn_codes, seed):
    codes = np.array([*drawn_codes, 0, 0, 1, 1])
    codes = np.unique(codes, return_inverse=True)[1]
    folds = deal_folds(codes, None, seed)
    counts = np.bincount(codes)
    assert ((folds.number == IN_ALL) == (counts[codes] == 1)).all()
    assert (folds.judged == (folds.number != IN_ALL)).all()
    assert set(folds.number.tolist()) - {IN_ALL} == set(range(folds.n))
    for fold in range(folds.n):
        assert set(codes[folds.number != fold]) == set(codes)
    per_fold = [np.bincount(codes[folds.number == fold], minlength=len(counts)) for fold in range(folds.n)]
    assert np.ptp(np.array(per_fold), axis=0).max() <= 1


def test_folds_are_of_whole_groups_where_each_fit_still_sees_all_types():
    codes = np.array([0, 1] * 20)
    groups = np.repeat(np.array(["a", "b", "c", "d"], object), 10)
    folds = deal_folds(codes, groups, 0)
    assert folds.by_group
    assert folds.n == 4
    assert all(len(set(folds.number[groups == name])) == 1 for name in "abcd")
    many = np.array([f"g{number // 2}" for number in range(40)], object)
    assert deal_folds(codes, many, 0).n == FOLDS


def test_a_group_that_alone_has_a_type_is_in_all_fits_and_the_others_are_folded_whole():
    codes = np.array([0, 1] * 15 + [0, 2] * 5)
    groups = np.repeat(np.array(["a", "b", "c", "d"], object), 10)
    folds = deal_folds(codes, groups, 0)
    assert folds.by_group
    assert (folds.number[groups == "d"] == IN_ALL).all()
    assert folds.n == 3
    assert all(len(set(folds.number[groups == name])) == 1 for name in "abc")


def test_folds_of_groups_have_about_as_many_cells():
    sizes = {"a": 8, "b": 30, "c": 9, "d": 15, "e": 12, "f": 20, "g": 40}
    groups = np.repeat(np.array(list(sizes), object), list(sizes.values()))
    folds = deal_folds(np.arange(len(groups)) % 2, groups, 0)
    assert sorted(np.bincount(folds.number)) == [20, 9 + 12, 8 + 15, 30, 40]


@pytest.mark.parametrize(
    "sizes",
    [{"a": 40}, {"a": 30, "b": 10}, {"a": 10, "b": 9, "c": 21}],
    ids=["one", "one of two has most", "one of three"],
)
def test_folds_are_of_cells_where_groups_would_leave_less_than_half_to_a_fit(sizes):
    groups = np.repeat(np.array(list(sizes), object), list(sizes.values()))
    folds = deal_folds(np.arange(40) % 2, groups, 0)
    assert not folds.by_group
    assert folds.n == FOLDS


@pytest.mark.parametrize("codes", [[0, 1, 2], [0, 0, 0, 1]], ids=str)
def test_fewer_than_two_types_with_two_cells_cannot_be_cross_validated(codes):
    with pytest.raises(InputError, match="types with two training cells or more, expected at least 2"):
        deal_folds(np.array(codes), None, 0)


def test_a_vector_that_is_the_centre_has_no_direction():
    assert directions(np.ones((1, 3)), np.ones(3)).tolist() == [[0.0, 0.0, 0.0]]
