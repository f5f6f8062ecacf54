import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from annatac_scale.errors import InputError, ModelError
from annatac_scale.model.calibration import (
    VECTOR_CELLS,
    Scaling,
    expected_calibration_error,
    fit_temperature,
    fit_vector,
    probabilities,
    vector_types,
)


def plain_softmax(row: list[float], temperature: float) -> list[float]:
    top = max(row)
    powers = [math.exp((score - top) / temperature) for score in row]
    return [power / sum(powers) for power in powers]


def plain_loss(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Cross-entropy with Platt's targets: (n + 1) / (n + 2) for the true type, the rest for the others."""
    n, n_types = logits.shape
    total = 0.0
    for row, y in zip(logits, labels, strict=True):
        for code, chance in enumerate(plain_softmax(row.tolist(), temperature)):
            target = (n + 1) / (n + 2) if code == y else 1 / (n + 2) / (n_types - 1)
            total -= target * math.log(chance)
    return total / n


def drawn(seed: int, n: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (n, 4))
    chances = np.exp(logits / temperature)
    chances /= chances.sum(axis=1, keepdims=True)
    labels = (chances.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return logits, labels


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(0, 5), st.integers(1, 4)), elements=st.floats(-50, 50)),
    st.floats(0.1, 10),
)
def test_probabilities_equal_a_plain_softmax(logits: np.ndarray, temperature: float) -> None:
    found = probabilities(logits, temperature)
    assert found.dtype == np.float64
    assert found.shape == logits.shape
    for row, expected in zip(found, logits, strict=True):
        assert row == pytest.approx(plain_softmax(expected.tolist(), temperature), abs=1e-12)


def test_probabilities_of_large_single_precision_logits_do_not_overflow() -> None:
    found = probabilities(np.array([[3e4, -3e4]], np.float32), 0.05)
    assert found.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_the_models_fault(bad: float) -> None:
    with pytest.raises(ModelError, match="1 of 4 values that are not finite"):
        probabilities(np.array([[1.0, bad], [1.0, 2.0]]), 1.0)
    with pytest.raises(ModelError, match="1 of 4 values that are not finite"):
        fit_temperature(np.array([[1.0, bad], [1.0, 2.0]]), np.array([0, 1]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_no_number_above_0_is_refused(temperature: float) -> None:
    with pytest.raises(ModelError, match="temperature: found"):
        probabilities(np.zeros((1, 2)), temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found_again(temperature: float) -> None:
    logits, labels = drawn(1, 20_000, temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_no_temperature_of_a_fine_grid_beats_the_fitted_one(seed: int) -> None:
    logits, labels = drawn(seed, 60, 2.0)
    fitted = plain_loss(logits, labels, fit_temperature(logits, labels))
    grid = np.exp(np.linspace(math.log(0.05), math.log(20), 300))
    assert fitted <= min(plain_loss(logits, labels, t) for t in grid) + 1e-9


def test_the_fit_of_single_precision_logits_is_the_same() -> None:
    logits, labels = drawn(5, 200, 2.0)
    expected = fit_temperature(logits.astype(np.float32).astype(np.float64), labels)
    assert fit_temperature(logits.astype(np.float32), labels.astype(np.int32)) == expected


@pytest.mark.parametrize("n", [1, 12, 300])
def test_n_cells_that_are_all_right_prove_a_confidence_of_n_plus_1_in_n_plus_2(n: int) -> None:
    logits = np.tile([4.0, 0.0], (n, 1))
    confidence = probabilities(logits, fit_temperature(logits, np.zeros(n, int)))[:, 0]
    assert confidence == pytest.approx((n + 1) / (n + 2), rel=1e-4)


def test_a_set_that_is_always_wrong_stops_at_the_upper_bound() -> None:
    assert fit_temperature(np.array([[9.0, 0.0]]), np.array([1])) == pytest.approx(20, rel=1e-3)


def test_where_no_temperature_is_better_it_stays_1() -> None:
    assert fit_temperature(np.zeros((3, 1)), np.zeros(3, int)) == 1.0
    assert fit_temperature(np.full((4, 3), 2.5), np.array([0, 1, 2, 2])) == 1.0


def test_no_temperature_is_fitted_without_cells() -> None:
    with pytest.raises(InputError, match="at least one cell"):
        fit_temperature(np.empty((0, 3)), np.empty(0, int))


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.zeros((2, 3)), np.array([0, 3])),
        (np.zeros((2, 3)), np.array([-1, 0])),
        (np.zeros((2, 3)), np.array([0, 1, 2])),
        (np.zeros((2, 3)), np.array([0.0, 1.0])),
        (np.zeros((2, 3)), np.zeros((2, 3), int)),
        (np.zeros(3), np.array([0, 1, 2])),
    ],
)
def test_labels_that_do_not_fit_the_scores_are_refused(logits: np.ndarray, labels: np.ndarray) -> None:
    for figure in (fit_temperature, expected_calibration_error):
        with pytest.raises(InputError, match="calibration: found scores of shape"):
            figure(logits, labels)


def plain_ece(chances: np.ndarray, labels: np.ndarray, n_bins: int) -> float:
    edges, error = np.linspace(0, 1, n_bins + 1), 0.0
    for low, high in pairwise(edges):
        cells = [i for i in range(len(labels)) if low < max(chances[i]) <= high]
        if cells:
            confidence = sum(max(chances[i]) for i in cells) / len(cells)
            right = sum(int(np.argmax(chances[i])) == labels[i] for i in cells) / len(cells)
            error += len(cells) / len(labels) * abs(confidence - right)
    return error


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 20))
def test_the_calibration_error_equals_a_plain_loop(seed: int, n: int, n_bins: int) -> None:
    rng = np.random.default_rng(seed)
    # Rounded, so that confidences fall on the edges of bins.
    first = np.round(rng.random(n), 1)
    chances = np.stack([first, 1 - first], axis=1)
    labels = rng.integers(0, 2, n)
    assert expected_calibration_error(chances, labels, n_bins) == pytest.approx(
        plain_ece(chances, labels, n_bins)
    )


def test_the_calibration_error_is_0_where_shares_are_as_said_and_grows_when_sure_and_wrong() -> None:
    chances = np.array([[0.75, 0.25]] * 4)
    assert expected_calibration_error(chances, np.array([0, 0, 0, 1])) == 0.0
    assert expected_calibration_error(np.array([[1.0, 0.0]] * 2), np.array([1, 1])) == 1.0


def test_fitting_the_temperature_lowers_the_calibration_error_of_an_overconfident_model() -> None:
    logits, labels = drawn(2, 5_000, 4.0)
    before = expected_calibration_error(probabilities(logits, 1.0), labels)
    after = expected_calibration_error(probabilities(logits, fit_temperature(logits, labels)), labels)
    assert before > 0.2
    assert after < 0.03


def test_vector_scaling_equals_a_plain_softmax_of_each_types_own_line() -> None:
    logits = np.array([[1.0, -2.0, 0.5], [3.0, 3.0, -1.0]])
    found = Scaling(1.0, (0.5, 2.0, 1.0), (0.1, -0.2, 0.0)).probabilities(logits)
    for row, scores in zip(found, logits.tolist(), strict=True):
        lines = [0.5 * scores[0] + 0.1, 2 * scores[1] - 0.2, scores[2]]
        assert row.tolist() == pytest.approx(plain_softmax(lines, 1.0), abs=1e-12)
    assert Scaling(2.0).kind == "temperature"
    assert Scaling(2.0, (1.0,), (0.0,)).kind == "vector"


def test_the_vector_that_made_the_labels_is_found_again() -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 2, (40_000, 3))
    scales, biases = np.array([0.5, 1.5, 1.0]), np.array([0.4, -0.6, 0.2])
    powers = np.exp(logits * scales + biases)
    chances = powers / powers.sum(axis=1, keepdims=True)
    labels = (rng.random((len(logits), 1)) > chances.cumsum(axis=1)).sum(axis=1)
    found = fit_vector(logits, labels)
    assert found.scales == pytest.approx(scales, rel=0.05)
    assert found.biases == pytest.approx(biases - biases.mean(), abs=0.05)
    assert found.temperature == fit_temperature(logits, labels)


@pytest.mark.parametrize("seed", range(3))
def test_vector_scaling_is_never_less_likely_than_the_temperature_it_starts_from(seed: int) -> None:
    logits, labels = drawn(seed, 200, 1.3)
    found = fit_vector(logits, labels)

    def loss(chances: np.ndarray) -> float:
        return -np.log(chances[np.arange(len(labels)), labels]).mean()

    vector, temperature = found.probabilities(logits), probabilities(logits, found.temperature)
    assert loss(vector) <= loss(temperature) + 1e-3  # the smoothing of labels may cost that much


def test_separable_cells_leave_the_vector_within_its_bounds() -> None:
    logits = np.eye(2)[[0] * 30 + [1] * 30] * 4
    found = fit_vector(logits, np.repeat([0, 1], 30))
    assert np.isfinite(found.scales).all()
    assert np.isfinite(found.biases).all()
    assert (found.probabilities(logits).argmax(axis=1) == np.repeat([0, 1], 30)).all()


def test_types_with_few_cells_or_none_keep_the_temperature_and_others_have_numbers_of_their_own() -> None:
    counts = [VECTOR_CELLS, VECTOR_CELLS - 1, 5 * VECTOR_CELLS, 0]
    labels = np.repeat(np.arange(4), counts)
    assert vector_types(labels, 4).tolist() == [True, False, True, False]
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 1, (len(labels), 4)) + 2 * np.eye(4)[labels] + [0, 0, 0, 1]
    found = fit_vector(logits, labels)
    scales, biases = np.array(found.scales), np.array(found.biases)
    assert scales[[1, 3]] == pytest.approx(1 / found.temperature)
    assert biases[1] == pytest.approx(biases[3])
    assert (np.abs(scales[[0, 2]] - 1 / found.temperature) > 1e-3).all()
    assert (np.abs(biases[[0, 2]] - biases[1]) > 1e-3).all()


@pytest.mark.parametrize(
    ("scales", "biases"),
    [((1.0,), ()), ((0.0, 1.0), (0.0, 0.0)), ((1.0, math.nan), (0.0, 0.0)), ((1.0, 1.0), (math.inf, 0.0))],
)
def test_vectors_that_cannot_be_are_refused(scales: tuple[float, ...], biases: tuple[float, ...]) -> None:
    with pytest.raises(ModelError, match="vector scaling: found scales"):
        Scaling(1.0, scales, biases)


def test_logits_of_other_types_than_the_vectors_are_refused() -> None:
    with pytest.raises(ModelError, match=r"found logits of shape \(4, 3\), expected \[n, 2\]"):
        Scaling(1.0, (1.0, 1.0), (0.0, 0.0)).probabilities(np.zeros((4, 3)))
