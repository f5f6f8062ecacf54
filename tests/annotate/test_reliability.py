"""Figures of confidence, novelty and prediction sets equal plain loops, scipy's and scikit-learn's."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from annatac_scale.annotate.reliability import calibration, novelty_figures, set_coverage
from annatac_scale.errors import InputError
from annatac_scale.model.calibration import expected_calibration_error


def error_by_loops(confidence: np.ndarray, right: np.ndarray) -> float:
    members: dict[int, list[float]] = {}
    for one, hit in zip(confidence.tolist(), right.tolist(), strict=True):
        members.setdefault(max(int(np.ceil(one * 15)) - 1, 0), []).append(one - hit)
    return sum(abs(sum(surplus)) for surplus in members.values()) / len(confidence)


@given(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1, max_size=50))
@settings(max_examples=50)
def test_error_and_bins_equal_plain_loops(cells: list[tuple[int, bool]]) -> None:
    confidence = np.array([k / 1000 for k, _ in cells])
    right = np.array([hit for _, hit in cells])
    found = calibration(confidence, right, n_draws=5)
    assert found.error == pytest.approx(error_by_loops(confidence, right))
    assert found.bins["n"].sum() == len(cells)
    for row in found.bins.itertuples():
        own = (confidence > row.low + 1e-12) & (confidence <= row.high + 1e-12) | (
            (confidence == 0) & (row.low == 0)
        )
        assert own.sum() == row.n
        assert confidence[own].mean() == pytest.approx(row.confidence)
        assert right[own].mean() == pytest.approx(row.right)


def test_the_error_is_that_of_the_model_room() -> None:
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.ones(4), 300)
    codes = rng.integers(0, 4, 300)
    found = calibration(chances.max(axis=1), chances.argmax(axis=1) == codes)
    assert found.error == pytest.approx(expected_calibration_error(chances, codes))


@pytest.mark.parametrize("n", [12, 300])
def test_the_band_is_that_of_outcomes_drawn_cell_by_cell(n: int) -> None:
    rng = np.random.default_rng(1)
    confidence = rng.beta(5, 1, n)
    errors = [error_by_loops(confidence, rng.random(n) < confidence) for _ in range(1500)]
    found = calibration(confidence, rng.random(n) < confidence, n_draws=6000)
    spread = np.std(errors)
    assert found.band == pytest.approx(np.quantile(errors, [0.025, 0.975]), abs=0.25 * spread)


def test_perfectly_calibrated_models_are_within_the_band_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    confidence = rng.uniform(0.3, 1, 200)
    n_within = sum(
        calibration(confidence, rng.random(200) < confidence, n_draws=400, seed=i).within_band
        for i in range(400)
    )
    # One-sided: 97.5% of them; 400 trials.
    assert 400 * 0.975 - 4 * np.sqrt(400 * 0.975 * 0.025) - 4 < n_within < 400


def test_a_model_that_is_too_sure_is_outside_the_band() -> None:
    rng = np.random.default_rng(3)
    found = calibration(np.full(500, 0.95), rng.random(500) < 0.8)
    assert not found.within_band
    assert found.error == pytest.approx(0.15, abs=0.05)
    row = found.bins.iloc[0]
    assert row["right"] < row["band_low"] < 0.95 < row["band_high"]
    low, high = binom_band(500, 0.95)
    assert (row["band_low"], row["band_high"]) == (
        pytest.approx(low, abs=0.005),
        pytest.approx(high, abs=0.005),
    )


def binom_band(n: int, p: float) -> tuple[float, float]:
    from scipy.stats import binom

    return binom.ppf(0.025, n, p) / n, binom.ppf(0.975, n, p) / n


def test_calibration_is_json_and_refuses_what_is_none() -> None:
    found = calibration([0.2, 0.9], [False, True])
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["n_cells"] == 2
    assert len(values["bins"]) == 2
    for confidence, right in ([], []), ([0.5], [True, False]), ([1.5], [True]), ([float("nan")], [True]):
        with pytest.raises(InputError, match="calibration: found confidences of shape"):
            calibration(confidence, right)


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
        lambda cells: 0 < sum(novel for _, novel in cells) < len(cells)
    )
)
def test_novelty_figures_equal_their_definitions(cells: list[tuple[int, bool]]) -> None:
    score = np.array([float(s) for s, _ in cells])
    novel = np.array([one for _, one in cells])
    found = novelty_figures(score, novel)
    pairs = [(1.0 if a > b else 0.5 if a == b else 0.0) for a in score[novel] for b in score[~novel]]
    assert found.auroc == pytest.approx(np.mean(pairs))
    rates = [
        (score[~novel] >= threshold).mean()
        for threshold in score
        if (score[novel] >= threshold).mean() >= 0.95
    ]
    assert found.fpr_at_95_tpr == pytest.approx(min(rates))
    assert (found.n_novel, found.n_known) == (novel.sum(), (~novel).sum())


def test_novelty_without_both_kinds_is_refused() -> None:
    for score, novel in ([1.0], [True]), ([1.0, 2.0], [False, False]), ([float("nan"), 1.0], [True, False]):
        with pytest.raises(InputError, match="novelty: found"):
            novelty_figures(score, novel)


def test_coverage_equals_plain_loops_and_a_set_never_holds_an_unknown_type() -> None:
    rng = np.random.default_rng(4)
    members = rng.random((200, 5)) < 0.6
    codes = rng.integers(-1, 5, 200)
    found = set_coverage(members, codes)
    hits = sum(bool(code >= 0 and row[code]) for row, code in zip(members, codes, strict=True))
    assert found.coverage == hits / 200
    ends = binomtest(hits, 200).proportion_ci(0.95, method="exact")
    assert found.interval == (pytest.approx(ends.low), pytest.approx(ends.high))
    assert found.mean_size == pytest.approx(np.mean([sum(row) for row in members.tolist()]))
    assert found.n_empty == sum(not any(row) for row in members.tolist())
    assert json.loads(json.dumps(found.to_dict()))["n_cells"] == 200


def test_sets_that_do_not_fit_are_refused() -> None:
    for members, codes in (np.zeros((0, 2)), []), (np.zeros((2, 2)), [0]), (np.zeros((1, 2)), [2]):
        with pytest.raises(InputError, match="prediction sets: found members of shape"):
            set_coverage(members, np.array(codes, int))
