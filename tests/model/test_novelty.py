"""Novelty scores equal plain loops, grow with distance, and stand at 0 for cells as usual at any depth."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import linregress
from sklearn.neighbors import NearestNeighbors

from annatac_scale.errors import ConfigError, ModelError
from annatac_scale.model.novelty import (
    DISTANCES,
    SCORES,
    TRENDED,
    DepthTrend,
    KnownCells,
    Outputs,
    checked_score,
    knn,
    mahalanobis,
    plain_score,
)
from annatac_scale.model.profiles import Profiles


def drawn_outputs(seed: int, n: int = 30, n_types: int = 3, channels: int = 4) -> Outputs:
    rng = np.random.default_rng(seed)
    logits, embedding = rng.normal(0, 3, (n, n_types)), rng.normal(size=(n, channels))
    n_open, fit = rng.integers(0, 500, n), rng.normal(-8, 1, n)
    return Outputs(*(part.astype(np.float32) for part in (logits, embedding)), n_open, fit.astype(np.float32))


def chances_of(outputs: Outputs) -> np.ndarray:
    powers = np.exp(outputs.logits)
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def without_calib(
    means: np.ndarray,
    whitening: np.ndarray,
    references: np.ndarray,
    reference_codes: np.ndarray,
    trends: dict[str, DepthTrend],
) -> KnownCells:
    return KnownCells(
        means,
        whitening,
        references,
        reference_codes.astype(np.int32),
        Profiles(np.empty((0, 3), np.float32)),
        trends,
        np.empty(0, np.float32),
        np.empty(0, np.int32),
        {},
        np.empty(0, np.int32),
    )


def drawn_known(seed: int, channels: int = 4) -> KnownCells:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    trends = {
        "energy": DepthTrend(-1.0, -2.0, 0.5, 0.0, 0.0, 4.0),
        "mahalanobis": DepthTrend(2.0, -0.5, 0.25, 0.0, 1.0, 5.0),
        "knn": DepthTrend(0, 0, 1, 0, 0, 9),
        "profile": DepthTrend(9.0, 0.1, 0.75, 0.5, 2.0, 6.0),
    }
    return without_calib(
        draw(3, channels), draw(channels, channels), draw(40, channels), np.arange(40) % 3, trends
    )


def test_the_plain_scores_equal_their_formulas() -> None:
    outputs = drawn_outputs(1)
    found = plain_score("energy", outputs, chances_of(outputs), 2.5)
    assert found.dtype == np.float32
    expected = [-2.5 * math.log(sum(math.exp(x / 2.5) for x in row)) for row in outputs.logits.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    found = plain_score("max_probability", outputs, chances_of(outputs), 1.0)
    assert found.tolist() == pytest.approx([1 - max(row) for row in chances_of(outputs).tolist()], abs=1e-6)


def test_mahalanobis_is_the_distance_to_the_nearest_mean_in_units_of_the_spread() -> None:
    rng = np.random.default_rng(2)
    root = rng.normal(size=(4, 4))
    covariance = root @ root.T + np.eye(4)
    whitening = np.linalg.inv(np.linalg.cholesky(covariance)).T  # whitening @ whitening.T is the precision
    means, cells = rng.normal(size=(3, 4)), rng.normal(size=(20, 4))
    found = mahalanobis(*(part.astype(np.float32) for part in (cells, means, whitening)))
    precision = np.linalg.inv(covariance)
    expected = [min(math.sqrt((z - m) @ precision @ (z - m)) for m in means) for z in cells]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 99), sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4), n=st.integers(0, 30)
)
def test_knn_is_the_distance_within_which_a_twentieth_of_some_type_lies(
    seed: int, sizes: list[int], n: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    references = rng.normal(size=(len(codes), 3)).astype(np.float32)
    cells = rng.normal(size=(n, 3)).astype(np.float32)
    found = knn(cells, references, codes)
    assert found.shape == (n,)
    if n:
        of_types = [
            NearestNeighbors(n_neighbors=math.ceil(size / 20))
            .fit(references[codes == code])
            .kneighbors(cells)[0]
            for code, size in enumerate(sizes)
        ]
        expected = np.min([distances[:, -1] for distances in of_types], axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_stored", [5, 9, 15])
def test_the_cells_of_a_rare_type_are_about_as_near_as_those_of_a_frequent_one(n_stored: int) -> None:
    rng = np.random.default_rng(11)
    centres = 8 * np.eye(3, 10)
    codes = np.repeat([0, 1, 2], [200, 200, n_stored])
    references = (centres[codes] + rng.normal(size=(len(codes), 10))).astype(np.float32)
    asked = np.repeat([0, 1, 2], 500)
    cells = (centres[asked] + rng.normal(size=(1500, 10))).astype(np.float32)
    found = knn(cells, references, codes)
    limit = np.quantile(found[asked < 2], 0.95)
    assert (found[asked == 2] > limit).mean() < 0.25
    assert (knn(cells - 8, references, codes) > limit).mean() > 0.99


def test_many_cells_score_as_each_alone() -> None:
    known, outputs = drawn_known(3), drawn_outputs(4, n=1100)
    for name in TRENDED:
        found = known.raw(name, outputs, 2.0)
        for cell in (0, 511, 512, 1099):
            alone = known.raw(name, Outputs(*(part[cell : cell + 1] for part in outputs)), 2.0)[0]
            assert found[cell] == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_given_above_the_trend_of_their_depth(name: str) -> None:
    known, outputs = drawn_known(5), drawn_outputs(6)
    trend = known.trends[name]
    found = known.score(name, outputs, chances_of(outputs), 1.0)
    assert found.dtype == np.float32
    for cell, distance in enumerate(known.raw(name, outputs, 1.0)):
        assert found[cell] == pytest.approx(above(trend, distance, outputs.n_open[cell]), rel=1e-4, abs=1e-4)


def above(trend: DepthTrend, score: float, n_open: int) -> float:
    depth = min(max(math.log(1 + n_open), trend.low), trend.high)
    usual, around = trend.intercept + trend.slope * depth, trend.spread * math.exp(-trend.narrowing * depth)
    return (score - usual) / around


def test_joint_is_the_sum_of_energy_and_misfit_each_above_its_trend_in_its_spread() -> None:
    known, outputs = drawn_known(13), drawn_outputs(14)
    found = known.score("joint", outputs, chances_of(outputs), 2.5)
    assert found.dtype == np.float32
    for cell, n_open in enumerate(outputs.n_open.tolist()):
        energy = -2.5 * math.log(sum(math.exp(x / 2.5) for x in outputs.logits[cell].tolist()))
        parts = {"energy": energy, "profile": -float(outputs.fit[cell])}
        expected = [above(known.trends[name], raw, n_open) for name, raw in parts.items()]
        assert found[cell] == pytest.approx(sum(expected), rel=1e-4, abs=1e-4)


def test_a_cell_that_fits_nothing_as_nothing_is_open_is_as_usual() -> None:
    known, outputs = drawn_known(15), drawn_outputs(16, n=2)
    outputs = outputs._replace(n_open=np.array([0, 9]), fit=np.array([np.nan, -8], np.float32))
    assert known.score("profile", outputs, chances_of(outputs), 1.0)[0] == 0
    energy = above(known.trends["energy"], known.raw("energy", outputs, 1.0)[0], 0)
    assert known.score("joint", outputs, chances_of(outputs), 1.0)[0] == pytest.approx(energy, rel=1e-5)
    broken = outputs._replace(n_open=np.array([3, 9]))
    assert np.isnan(known.score("profile", broken, chances_of(outputs), 1.0)[0])


def test_the_trend_is_the_least_squares_line() -> None:
    rng = np.random.default_rng(7)
    n_open = rng.integers(1, 3000, 300)
    scores = 5 - 0.6 * np.log1p(n_open) + rng.normal(0, 0.2, 300)
    found = DepthTrend.fit(scores, n_open)
    expected = linregress(np.log1p(n_open), scores)
    assert (found.intercept, found.slope) == pytest.approx((expected.intercept, expected.slope), rel=1e-5)
    residuals = scores - expected.intercept - expected.slope * np.log1p(n_open)
    assert found.spread == pytest.approx(residuals.std(ddof=2), rel=1e-5)
    corrected = found.corrected(scores, n_open)
    assert (corrected.mean(), corrected.std(ddof=2)) == pytest.approx((0, 1), abs=1e-4)
    assert abs(np.corrcoef(corrected, np.log1p(n_open))[0, 1]) < 1e-4


@pytest.mark.parametrize("n", [2, 3, 8, 19])
def test_of_few_cells_the_trend_is_level_and_its_spread_is_theirs(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        scores, n_open = rng.normal(5, 0.2, n), rng.integers(1, 3000, n)
        found = DepthTrend.fit(scores, n_open)
        assert found.slope == 0
        assert (found.intercept, found.spread) == pytest.approx((scores.mean(), scores.std(ddof=1)), rel=1e-5)


def test_of_enough_cells_the_spread_is_as_wide_among_others() -> None:
    rng = np.random.default_rng(12)
    squares = []
    for _ in range(2000):
        fitted = DepthTrend.fit(rng.normal(5, 0.2, 20), rng.integers(1, 3000, 20))
        squares.append(fitted.spread**2)
    assert np.mean(squares) == pytest.approx(0.2**2, rel=0.03)


def test_the_deviation_follows_depth_where_it_is_asked_to_and_cells_are_many() -> None:
    rng = np.random.default_rng(15)
    n_open = rng.integers(20, 3000, 4000)
    around = 3 * (1.0 + n_open) ** -0.5
    scores = 5 - 0.6 * np.log1p(n_open) + rng.normal(0, around)
    found = DepthTrend.fit(scores, n_open, spreading=True)
    assert found.narrowing == pytest.approx(0.5, rel=0.15)
    assert found.spread * 500**-found.narrowing == pytest.approx(3 * 500**-0.5, rel=0.1)
    corrected = found.corrected(scores, n_open)
    assert corrected.std() == pytest.approx(1, abs=1e-2)
    for chosen in (n_open < 200, n_open > 2000):
        assert corrected[chosen].std() == pytest.approx(1, abs=0.1)
    level = DepthTrend.fit(scores, n_open)
    assert level.narrowing == 0
    assert level.corrected(scores, n_open)[n_open < 200].std() > 1.5
    assert DepthTrend.fit(scores[:99], n_open[:99], spreading=True).narrowing == 0
    assert DepthTrend.fit(scores[:100], n_open[:100], spreading=True).narrowing != 0
    flat = DepthTrend.fit(np.full(200, 2.0), n_open[:200], spreading=True)
    assert np.isfinite(flat.corrected(np.full(200, 2.0), n_open[:200])).all()


def test_cells_without_a_score_have_no_part_in_the_trend() -> None:
    rng = np.random.default_rng(16)
    n_open, scores = rng.integers(1, 3000, 50), rng.normal(5, 1, 50)
    more = DepthTrend.fit(np.append(scores, [np.nan] * 3), np.append(n_open, [0] * 3))
    assert more == DepthTrend.fit(scores, n_open)
    assert DepthTrend.fit(np.full(3, np.nan), np.zeros(3, np.int64)) == DepthTrend(0, 0, 1, 0, 0, 0)


def test_beyond_the_depths_that_it_was_fitted_on_the_trend_is_level() -> None:
    found = DepthTrend.fit(np.repeat([3.0, 2.0, 1.5], 7), np.repeat([10, 100, 1000], 7))
    assert found.slope < 0
    same = np.array([2.0, 2.0])
    deep = found.corrected(same, np.array([1000, 10**6]))
    assert deep[0] == pytest.approx(deep[1])
    low = found.corrected(same, np.array([0, 10]))
    assert low[0] == pytest.approx(low[1])


@pytest.mark.parametrize(
    ("scores", "n_open"),
    [([2.0], [7]), ([2.0, 2.0], [7, 9]), ([1.0, 3.0], [7, 7]), ([1.0, 3.0] * 10, [7] * 20)],
    ids=["one", "flat", "depth", "depth of many"],
)
def test_cells_without_a_spread_have_a_trend(scores: list[float], n_open: list[int]) -> None:
    found = DepthTrend.fit(np.array(scores), np.array(n_open))
    corrected = found.corrected(np.array(scores), np.array(n_open))
    assert np.isfinite(corrected).all()
    assert corrected.mean() == pytest.approx(0, abs=1e-3)


def test_cells_far_from_all_known_ones_score_higher_than_known_ones() -> None:
    rng = np.random.default_rng(8)
    centres = rng.normal(0, 3, (3, 4))
    embedding = (centres[rng.integers(0, 3, 200)] + rng.normal(size=(200, 4))).astype(np.float32)
    trends = {name: DepthTrend(0, 0, 1, 0, 0, 9) for name in TRENDED}
    whitening, codes = np.eye(4, dtype=np.float32), np.arange(100) % 3
    known = without_calib(centres.astype(np.float32), whitening, embedding[:100], codes, trends)
    strange = (10 + rng.normal(size=(50, 4))).astype(np.float32)
    for distance in (
        lambda cells: mahalanobis(cells, known.means, known.whitening),
        lambda cells: knn(cells, known.references, known.reference_codes),
    ):
        assert distance(embedding[100:]).max() < distance(strange).min()


def test_calib_cells_of_a_depth_are_those_with_as_many_open_islands_and_all_that_is_kept_of_them() -> None:
    known = replace(
        drawn_known(10),
        chances=np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        codes=np.array([2, 0, 1, 0], np.int32),
        scores={name: np.array([4, 3, 2, 1], np.float32) + number for number, name in enumerate(SCORES)},
        n_open=np.array([7, 0, 5, 4], np.int32),
    )
    assert known.of_depth(0).n_calib == 4
    deep = known.of_depth(5)
    assert (deep.n_calib, deep.codes.tolist(), deep.n_open.tolist()) == (2, [2, 1], [7, 5])
    assert deep.chances.tolist() == known.chances[[0, 2]].tolist()
    assert [deep.scores[name].tolist() for name in SCORES] == [[4 + n, 2 + n] for n in range(len(SCORES))]
    assert deep.references is known.references
    assert known.of_depth(8).n_calib == 0


def test_names_that_are_no_score_are_refused() -> None:
    assert [checked_score(name) for name in SCORES] == list(SCORES)
    outputs = drawn_outputs(9)
    with pytest.raises(ConfigError, match="novelty score: found 'entropy', expected max_probability"):
        drawn_known(9).score("entropy", outputs, chances_of(outputs), 1.0)
    with pytest.raises(ModelError, match="novelty score knn: the model keeps no cells"):
        plain_score("knn", outputs, chances_of(outputs), 1.0)
