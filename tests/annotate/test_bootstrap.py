"""Intervals and tests equal those of drawing the cells themselves, and of scipy."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, ks_2samp
from sklearn import metrics as sk

from annatac_scale.annotate.bootstrap import (
    _drawn,
    _Sums,
    bootstrap_intervals,
    compare_labels,
    share_interval,
)
from annatac_scale.annotate.metrics import HEADLINES, evaluate_labels
from annatac_scale.errors import ConfigError, InputError
from annatac_scale.model.labels import NOVEL


def draw_labels(n: int, share_right: float, seed: int, of_truth: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted labels of cells of 4 unequal types."""
    names = np.array(["A", "B", "C", "D", NOVEL], object)
    truth = names[np.random.default_rng(of_truth).choice(4, n, p=[0.5, 0.3, 0.15, 0.05])]
    rng = np.random.default_rng(seed)
    return truth, np.where(rng.random(n) < share_right, truth, names[rng.integers(0, 5, n)])


def figures_by_sklearn(truth: np.ndarray, label: np.ndarray) -> dict[str, float]:
    types = sorted(set(truth))
    return {
        "accuracy": sk.accuracy_score(truth, label),
        "macro_f1": sk.f1_score(truth, label, labels=types, average="macro", zero_division=0),
        "kappa": sk.cohen_kappa_score(truth, label),
        "jaccard_micro": sk.jaccard_score(truth, label, average="micro"),
        "jaccard_weighted": sk.jaccard_score(truth, label, average="weighted", zero_division=0),
    }


def assert_holds_95_percent(interval: tuple[float, float], drawn: np.ndarray) -> None:
    """Of some hundred draws 2.5% lie beyond each end, those at the end itself on either side: they are discrete."""
    low, high = interval
    assert (drawn < low - 1e-9).mean() < 0.05
    assert (drawn > high + 1e-9).mean() < 0.05
    assert (drawn <= low + 1e-9).mean() > 0.008
    assert (drawn >= high - 1e-9).mean() > 0.008


def drawn_within_types(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many cells of each type as there are, with replacement."""
    members = [np.flatnonzero(truth == name) for name in np.unique(truth)]
    return np.concatenate([rng.choice(own, len(own)) for own in members])


def test_figures_of_drawn_counts_have_the_distribution_of_those_of_drawn_cells() -> None:
    truth, label = draw_labels(60, 0.7, 1)
    rng = np.random.default_rng(2)
    by_cells: dict[str, list[float]] = {name: [] for name in HEADLINES}
    for _ in range(600):
        whatever, within = (
            figures_by_sklearn(truth[cells], label[cells])
            for cells in (rng.integers(0, 60, 60), drawn_within_types(truth, rng))
        )
        for name in HEADLINES:
            by_cells[name].append((within if name == "macro_f1" else whatever)[name])
    found = evaluate_labels(truth, label)
    counts = found.confusion.to_numpy()
    rows, columns = counts.nonzero()
    (drawn,) = _drawn([_Sums(rows, columns, len(counts))], rows, counts[rows, columns], 4000, 3)
    intervals = bootstrap_intervals(found, 4000, 3)
    for name in HEADLINES:
        assert len(drawn[name]) == 4000
        assert ks_2samp(by_cells[name], drawn[name]).pvalue > 1e-3, name
        assert_holds_95_percent(intervals[name], np.array(by_cells[name]))


def test_the_interval_of_accuracy_is_that_of_a_binomial() -> None:
    truth, label = draw_labels(900, 0.8, 4)
    found = evaluate_labels(truth, label)
    low, high = bootstrap_intervals(found, 20_000)["accuracy"]
    expected = binom(900, found.accuracy)
    assert low * 900 == pytest.approx(expected.ppf(0.025), abs=1.01)
    assert high * 900 == pytest.approx(expected.ppf(0.975), abs=1.01)


def test_a_type_of_one_cell_is_in_the_macro_f1_of_every_draw() -> None:
    truth = ["A"] * 30 + ["B"]
    assert bootstrap_intervals(evaluate_labels(truth, truth))["macro_f1"] == (1.0, 1.0)
    singles = [f"single{number}" for number in range(10)]
    truth = ["A"] * 1000 + ["B"] * 1000 + singles
    # The F1 of A is 2000 / 2010 in every draw, that of B 1, and those of the ten types 0.
    found = evaluate_labels(truth, ["A"] * 1000 + ["B"] * 1000 + ["A"] * 10)
    expected = (1 + 2000 / 2010) / 12
    assert found.macro_f1 == pytest.approx(expected)
    assert bootstrap_intervals(found)["macro_f1"] == (pytest.approx(expected), pytest.approx(expected))


def test_a_difference_in_types_of_one_cell_is_in_its_own_interval() -> None:
    singles = [f"single{number}" for number in range(10)]
    truth = ["A"] * 100 + ["B"] * 100 + singles
    found = compare_labels(truth, truth, ["A"] * 100 + ["B"] * 100 + ["A"] * 10).macro_f1
    assert found.interval == (pytest.approx(found.difference), pytest.approx(found.difference))


def test_intervals_repeat_and_depend_on_the_seed_and_on_nothing_but_counts() -> None:
    truth, label = draw_labels(200, 0.6, 5)
    found = evaluate_labels(truth, label)
    intervals = bootstrap_intervals(found, 500)
    order = np.random.default_rng(0).permutation(200)
    assert bootstrap_intervals(evaluate_labels(truth[order], label[order]), 500) == intervals
    assert bootstrap_intervals(found, 500, seed=1) != intervals
    for name in HEADLINES:
        assert intervals[name].low <= getattr(found, name) <= intervals[name].high


def test_draws_in_several_goes_are_draws_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluate_labels(*draw_labels(200, 0.6, 5))
    whole = bootstrap_intervals(found, 300)
    monkeypatch.setattr("annatac_scale.annotate.bootstrap._AT_ONCE", 100)
    assert bootstrap_intervals(found, 300) == whole


def test_an_undefined_kappa_has_an_undefined_interval() -> None:
    interval = bootstrap_intervals(evaluate_labels(["A", "A"], ["A", "A"]))["kappa"]
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert interval.to_json() is None


def test_no_draw_is_refused() -> None:
    with pytest.raises(ConfigError, match="found 0 draws; expected at least 1"):
        bootstrap_intervals(evaluate_labels(["A"], ["A"]), 0)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_a_share_holds_what_would_not_be_surprising(hits: tuple[int, int]) -> None:
    k, n = hits
    low, high = share_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    # The definition of Clopper and Pearson: at each end the tail is 2.5%.
    assert low == 0 if k == 0 else binom.sf(k - 1, n, low) == pytest.approx(0.025, rel=1e-4)
    assert high == 1 if k == n else binom.cdf(k, n, high) == pytest.approx(0.025, rel=1e-4)


def paired_by_cells(
    truth: np.ndarray, first: np.ndarray, second: np.ndarray, draws: int
) -> dict[str, np.ndarray]:
    """Differences of accuracy and macro F1 of draws of cells, by scikit-learn."""
    rng = np.random.default_rng(9)
    found: dict[str, list[float]] = {"accuracy": [], "macro_f1": []}
    types = sorted(set(truth))
    for _ in range(draws):
        cells = drawn_within_types(truth, rng)
        one, two = (
            sk.f1_score(truth[cells], label[cells], labels=types, average="macro", zero_division=0)
            for label in (first, second)
        )
        found["macro_f1"].append(one - two)
        cells = rng.integers(0, len(truth), len(truth))
        found["accuracy"].append((truth == first)[cells].mean() - (truth == second)[cells].mean())
    return {name: np.array(values) for name, values in found.items()}


def test_the_paired_test_is_that_of_drawing_cells_with_both_their_labels() -> None:
    truth, first = draw_labels(80, 0.75, 1)
    # The second errs where the first does, and on some more cells: they differ in few.
    _, other = draw_labels(80, 0.6, 7)
    second = np.where(np.arange(80) % 4 == 0, other, first)
    by_cells = paired_by_cells(truth, first, second, 500)
    found = compare_labels(truth, first, second, 4000)
    one, two = figures_by_sklearn(truth, first), figures_by_sklearn(truth, second)
    for name, difference in (("accuracy", found.accuracy), ("macro_f1", found.macro_f1)):
        assert (difference.first, difference.second) == (pytest.approx(one[name]), pytest.approx(two[name]))
        assert difference.difference == pytest.approx(one[name] - two[name])
        assert_holds_95_percent(difference.interval, by_cells[name])
        tails = 2 * min((by_cells[name] <= 0).mean(), (by_cells[name] >= 0).mean())
        assert difference.p == pytest.approx(min(tails, 1), abs=0.06)


@settings(max_examples=50)
@given(st.lists(st.tuples(*[st.sampled_from("ABC")] * 3), min_size=1, max_size=60))
def test_mcnemar_is_the_sign_test_of_the_cells_that_one_alone_has_right(
    cells: list[tuple[str, str, str]],
) -> None:
    truth, first, second = map(np.array, zip(*cells, strict=True))
    found = compare_labels(truth, first, second, 10)
    only_first = int(((first == truth) & (second != truth)).sum())
    only_second = int(((first != truth) & (second == truth)).sum())
    assert (found.n_only_first, found.n_only_second) == (only_first, only_second)
    n = only_first + only_second
    expected = binomtest(only_first, n, 0.5).pvalue if n else 1.0
    assert found.p_mcnemar == pytest.approx(expected)
    backwards = compare_labels(truth, second, first, 10)
    assert backwards.p_mcnemar == found.p_mcnemar
    assert backwards.accuracy.difference == -found.accuracy.difference


def test_equal_labels_do_not_differ_and_much_better_ones_do() -> None:
    truth, good = draw_labels(400, 0.9, 1)
    _, bad = draw_labels(400, 0.3, 2)
    same = compare_labels(truth, good, good)
    assert (same.accuracy.p, same.macro_f1.p, same.p_mcnemar) == (1, 1, 1)
    assert same.accuracy.interval == (0, 0)
    apart = compare_labels(truth, good, bad)
    assert apart.accuracy.p == apart.macro_f1.p == pytest.approx(2 / 1001)
    assert apart.p_mcnemar < 1e-20
    assert apart.accuracy.interval.low > 0.3


def test_cells_without_a_truth_are_left_out_and_the_dictionary_is_json() -> None:
    found = compare_labels(["A", None, "B"], ["A", "A", "A"], ["B", None, "B"])
    assert found.n_cells == 2
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["accuracy"] == {
        "first": 0.5, "second": 0.5, "difference": 0, "interval": [-1, 1], "p": 1,
    }  # fmt: skip
    assert (values["n_only_first"], values["n_only_second"], values["p_mcnemar"]) == (1, 1, 1)


def test_labels_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(InputError, match="found 2, 1, 2 true, first and second labels"):
        compare_labels(["A", "B"], ["A"], ["A", "B"])
    with pytest.raises(InputError, match="found 1 missing labels of 2 cells"):
        compare_labels(["A", "B"], ["A", None], ["A", "B"])
    with pytest.raises(InputError, match="found 0 missing labels of 0 cells"):
        compare_labels([None], ["A"], ["A"])
    with pytest.raises(ConfigError, match="found -1 draws"):
        compare_labels(["A"], ["A"], ["A"], -1)


def test_a_million_cells_cost_what_their_combinations_do() -> None:
    truth, label = draw_labels(1_000_000, 0.8, 1)
    low, high = bootstrap_intervals(evaluate_labels(truth, label))["accuracy"]
    assert high - low == pytest.approx(
        2 * 1.96 * math.sqrt(low * (1 - low) / 1e6), rel=0.15
    )  # normal at such an n
