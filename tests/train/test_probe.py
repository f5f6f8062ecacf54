import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp

from annatac_scale.errors import InputError
from annatac_scale.train.probe import (
    FOLDS,
    IN_ALL,
    STRENGTHS,
    deal_folds,
    directions,
    fit_linear,
    fit_probe,
)


def drawn(n, n_types=3, seed=0, spread=1.5):
    """Vectors around a centre a type, types and weights."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % n_types
    vectors = 3 + rng.normal(size=(n_types, 6))[codes] + spread * rng.normal(size=(n, 6))
    return vectors, codes, rng.uniform(0.5, 2, n)


def objective(x, codes, weights, strength, weight, bias):
    logits = x @ weight.T + bias
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(x)), codes]
    return strength * (weights * losses).sum() + 0.5 * (weight**2).sum()


@pytest.mark.parametrize("strength", [0.3, 10.0])
def test_the_fit_is_the_minimum_of_its_objective(strength):
    vectors, codes, weights = drawn(60)
    linear = fit_linear(vectors, codes, weights, strength)
    x = vectors - vectors.mean(0)
    x /= np.sqrt((x**2).sum(1, keepdims=True))

    def loss(flat):
        return objective(x, codes, weights, strength, flat[:18].reshape(3, 6), flat[18:])

    found = minimize(loss, np.zeros(21), method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(linear.weight, found.x[:18].reshape(3, 6), atol=2e-4 * strength)
    np.testing.assert_allclose(linear.logits(vectors), x @ linear.weight.T + linear.bias)


def test_of_two_types_the_probabilities_are_those_of_the_logistic_function():
    vectors, codes, weights = drawn(40, n_types=2)
    linear = fit_linear(vectors, codes, weights, 3.0)
    logits = linear.logits(vectors)
    x = directions(vectors, vectors.mean(0))

    def loss(flat):
        score = x @ flat[:6] + flat[6]
        signed = np.where(codes == 1, score, -score)
        return 3.0 * (weights * np.log1p(np.exp(-signed))).sum() + 0.5 * (flat[:6] ** 2).sum()

    found = minimize(loss, np.zeros(7), method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], x @ found.x[:6] + found.x[6], atol=1e-3)


def test_each_cell_is_judged_by_a_fit_that_did_not_see_it_at_the_strength_of_least_loss():
    vectors, codes, weights = drawn(45)
    folds = deal_folds(codes, None, 0)
    probe = fit_probe(vectors, codes, weights, folds)
    losses = {}
    for strength in STRENGTHS:
        by_hand = np.empty((45, 3))
        for cell in range(45):
            others = folds.number != folds.number[cell]
            fitted = fit_linear(vectors[others], codes[others], weights[others], strength)
            by_hand[cell] = fitted.logits(vectors[cell : cell + 1])[0]
        own = log_softmax(by_hand, axis=1)[np.arange(45), codes]
        losses[strength] = -(own * weights).sum() / weights.sum()
        if strength == probe.strength:
            np.testing.assert_allclose(probe.logits, by_hand, rtol=1e-9)
    assert probe.losses == pytest.approx(losses)
    assert probe.strength == min(losses, key=losses.get)
    np.testing.assert_array_equal(
        probe.linear.weight, fit_linear(vectors, codes, weights, probe.strength).weight
    )


def test_noise_asks_for_less_strength_than_signal():
    """Where types cannot be told the smallest C is best, where they are far apart a large one."""
    strengths = []
    for spread in (0.05, 50.0):
        vectors, codes, weights = drawn(60, spread=spread)
        strengths.append(fit_probe(vectors, codes, weights, deal_folds(codes, None, 0)).strength)
    assert strengths[0] == STRENGTHS[-1]
    assert strengths[1] == STRENGTHS[0]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 3))
def test_every_fit_sees_all_types_and_every_cell_that_can_be_is_held_out_once(drawn_codes, seed):
    codes = np.array([*drawn_codes, 0, 0, 1, 1])
    codes = np.unique(codes, return_inverse=True)[1]
    folds = deal_folds(codes, None, seed)
    counts = np.bincount(codes)
    assert ((folds.number == IN_ALL) == (counts[codes] == 1)).all()
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


def test_folds_are_of_cells_where_one_group_alone_has_a_type():
    codes = np.array([0, 1] * 15 + [2] * 10)
    groups = np.repeat(np.array(["a", "b", "c", "d"], object), 10)
    folds = deal_folds(codes, groups, 0)
    assert not folds.by_group
    assert folds.n == FOLDS


@pytest.mark.parametrize("codes", [[0, 1, 2], [0, 0, 0, 1]], ids=str)
def test_fewer_than_two_types_with_two_cells_cannot_be_cross_validated(codes):
    with pytest.raises(InputError, match="types with two training cells or more, expected at least 2"):
        deal_folds(np.array(codes), None, 0)


def test_a_vector_that_is_the_centre_has_no_direction():
    assert directions(np.ones((1, 3)), np.ones(3)).tolist() == [[0.0, 0.0, 0.0]]
