"""Sets and p-values equal plain loops, and their coverage is what exchangeable cells must give."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom

from annatac_scale.errors import ConfigError
from annatac_scale.model.conformal import exceeds, fewest_covering, p_values, rank_of, set_thresholds

shares = st.integers(1, 99).map(lambda percent: percent / 100)
# Few different values, so that there are ties.
chances_lists = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), max_size=40)


@given(n=st.integers(0, 3000), percent=st.integers(1, 99))
def test_the_rank_is_the_exact_ceiling_whatever_floats_do(n: int, percent: int) -> None:
    hundredths = (n + 1) * percent
    ceiling = hundredths // 100 + (hundredths % 100 > 0)
    assert rank_of(n, percent / 100) == min(ceiling, n + 1)


def test_the_rank_does_not_round_where_the_product_of_floats_would() -> None:
    # 100 x 0.29 is 28.999999999999996 and 50 x 0.58 is 28.999999999999996 as floats.
    assert (rank_of(99, 0.29), rank_of(99, 0.07), rank_of(9, 0.9), rank_of(8, 0.9)) == (29, 7, 9, 9)


def plain_thresholds(
    chances: list[float], codes: list[int], n_types: int, coverage: float, per_class: bool
) -> list[float]:
    def limit(scores: list[float]) -> float | None:
        rank = math.ceil((len(scores) + 1) * Fraction(str(coverage)))
        return None if rank > len(scores) else 1 - sorted(scores)[rank - 1]

    marginal = limit([1 - p for p in chances])
    found = []
    for code in range(n_types):
        own = limit([1 - p for p, c in zip(chances, codes, strict=True) if c == code]) if per_class else None
        found.append(own if own is not None else marginal if marginal is not None else 0.0)
    return found


@given(data=st.data(), chances=chances_lists, coverage=shares, per_class=st.booleans())
def test_thresholds_equal_a_plain_loop(
    data: st.DataObject, chances: list[float], coverage: float, per_class: bool
) -> None:
    codes = data.draw(st.lists(st.integers(0, 2), min_size=len(chances), max_size=len(chances)))
    found = set_thresholds(
        np.array(chances, np.float32), np.array(codes, np.int32), 4, coverage, per_class=per_class
    )
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(plain_thresholds(chances, codes, 4, coverage, per_class), abs=1e-6)


def test_a_type_with_too_few_cells_takes_the_marginal_threshold() -> None:
    chances = np.linspace(0.01, 1, 100).astype(np.float32)
    codes = np.repeat([0, 1], [92, 8])  # 8 is one less than 1 / 0.1 - 1
    marginal = set_thresholds(chances, codes, 2, 0.9, per_class=False)
    own = set_thresholds(chances, codes, 2, 0.9, per_class=True)
    assert own[1] == marginal[1] == marginal[0]
    assert own[0] != marginal[0]
    codes = np.repeat([0, 1], [91, 9])
    assert set_thresholds(chances, codes, 2, 0.9, per_class=True)[1] == chances[91]  # the least of its nine


@pytest.mark.parametrize("coverage", [0.001, 0.3, 0.5, 0.58, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_the_fewest_cells_that_a_coverage_takes_are_the_first_that_leave_a_type_out(coverage: float) -> None:
    fewest = fewest_covering(coverage)
    assert fewest == next(n for n in range(1000) if n >= 1 / (1 - Fraction(str(coverage))) - 1)
    for n, lets_all_in in ((fewest - 1, True), (fewest, False)):
        found = set_thresholds(np.ones(n, np.float32), np.zeros(n, int), 2, coverage, per_class=False)
        assert (found == 0).all() == lets_all_in


def test_too_few_cells_let_every_type_in() -> None:
    for n in (0, 8):
        assert (
            set_thresholds(np.ones(n, np.float32), np.zeros(n, int), 3, 0.9, per_class=False).tolist()
            == [0] * 3
        )


@given(
    scores=st.lists(st.integers(0, 6).map(float), max_size=30),
    calib=st.lists(st.integers(0, 6).map(float), max_size=60),
    rate=shares,
)
def test_p_values_equal_a_plain_loop_and_the_threshold_says_the_same(
    scores: list[float], calib: list[float], rate: float
) -> None:
    ordered = np.sort(np.array(calib, np.float64))
    found = p_values(np.array(scores, np.float64), ordered)
    expected = [Fraction(1 + sum(c >= s for c in calib), len(calib) + 1) for s in scores]
    assert found.tolist() == pytest.approx([float(p) for p in expected])
    novel = exceeds(np.array(scores, np.float64), ordered, rate)
    assert novel.tolist() == [p <= Fraction(str(rate)) for p in expected]


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share of cells: found"):
        set_thresholds(np.ones(3, np.float32), np.zeros(3, int), 1, share, per_class=False)
    with pytest.raises(ConfigError, match="share of cells: found"):
        exceeds(np.ones(3), np.ones(3), share)


def drawn_chances(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of 3 types that are wrong in their own way, and true types, the last of which is rare."""
    truth = rng.choice(3, n, p=[0.6, 0.3, 0.1])
    logits = rng.normal(0, 1.5, (n, 3)) + 2.0 * np.eye(3)[truth]
    powers = np.exp(logits)
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32), truth


@pytest.mark.parametrize("coverage", [0.8, 0.9])
@pytest.mark.parametrize("per_class", [False, True])
def test_exchangeable_cells_are_covered_as_the_beta_binomial_says(coverage: float, per_class: bool) -> None:
    """Of m new cells, the number covered is beta-binomial(m, k, n + 1 - k): Vovk 2012."""
    rng = np.random.default_rng(3)
    n, m, draws = 150, 100, 400
    totals, expected, variance = np.zeros(3), np.zeros(3), np.zeros(3)
    for _ in range(draws):
        chances, truth = drawn_chances(rng, n + m)
        calib = chances[np.arange(n), truth[:n]]
        thresholds = set_thresholds(calib, truth[:n], 3, coverage, per_class=per_class)
        covered = chances[np.arange(n, n + m), truth[n:]] >= thresholds[truth[n:]]
        if not per_class:
            rank = math.ceil((n + 1) * Fraction(str(coverage)))
            law = betabinom(m, rank, n + 1 - rank)
            totals[0] += covered.sum()
            expected[0] += law.mean()
            variance[0] += law.var()
            continue
        for code in range(3):
            n_own, m_own = int((truth[:n] == code).sum()), int((truth[n:] == code).sum())
            rank = math.ceil((n_own + 1) * Fraction(str(coverage)))
            if rank > n_own:  # the marginal threshold, which promises nothing of this type
                continue
            law = betabinom(m_own, rank, n_own + 1 - rank)
            totals[code] += covered[truth[n:] == code].sum()
            expected[code] += law.mean()
            variance[code] += law.var()
    asked = [0, 1, 2] if per_class else [0]
    assert (np.abs(totals - expected)[asked] <= 4 * np.sqrt(variance[asked])).all()
    assert (totals[asked] > 0).all()


def test_the_chosen_rate_of_false_alarms_is_kept_by_exchangeable_scores() -> None:
    rng = np.random.default_rng(4)
    n, m, draws, rate = 59, 50, 400, 0.05
    alarms = sum(
        exceeds(rng.gamma(2, size=m), np.sort(rng.gamma(2, size=n)), rate).sum() for _ in range(draws)
    )
    law = betabinom(m, 3, 57)  # 3 of 60 places lie above the limit
    assert abs(alarms - draws * law.mean()) <= 4 * math.sqrt(draws * law.var())
