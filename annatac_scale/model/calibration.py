"""How sure a prediction is: the temperature of a model, its probabilities, and how far to trust them.

The probabilities are softmax(logits / T). T is one number, fitted on labelled cells that training did not
see, so that of the cells whose best type has probability p a share of about p is right (Guo et al., ICML
2017). It never changes which type is best.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

from annatac_scale.errors import InputError, ModelError

# Where the best type is always right, the likelihood rises without end as T falls: hence bounds.
TEMPERATURE_BOUNDS = (0.05, 20.0)


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature in TEMPERATURE_BOUNDS that minimises the cross-entropy with smoothed labels.

    The true type's target is (n + 1) / (n + 2), the rest is spread over the other types (after Platt 1999): few cells,
    all of them right, are no proof of certainty. With many cells this is the negative log-likelihood.

    logits: float [n, C]; labels: int [n], 0 to C - 1. A likelihood that no temperature betters gives 1.0.
    Raises InputError without cells or for labels that do not fit the logits, ModelError for logits that are not
    finite.
    """
    scores = np.asarray(logits, np.float64)
    truth = _checked(labels, scores)
    _check_finite(scores)
    n, n_types = scores.shape
    of_truth = scores[np.arange(n), truth]
    doubt = 1 / (n + 2)
    elsewhere = (scores.sum(axis=1) - of_truth) / max(n_types - 1, 1)
    expected = (1 - doubt) * of_truth + doubt * elsewhere if n_types > 1 else of_truth

    def loss(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        return float(np.mean(logsumexp(scores * inverse, axis=1) - expected * inverse))

    low, high = np.log(TEMPERATURE_BOUNDS)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    # Less than this is rounding, as where all logits of a cell are equal.
    return float(np.exp(found.x)) if found.fun < loss(0.0) - 1e-12 else 1.0


def probabilities(logits: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """softmax(logits / temperature) of each row, float64 [n, C].

    Raises ModelError for logits that are not finite or a temperature that is not a number above 0.
    """
    if not 0 < temperature < np.inf:
        raise ModelError(
            f"temperature: found {temperature}; expected a number above 0; finetune the model again"
        )
    scores = np.asarray(logits, np.float64)
    _check_finite(scores)
    return softmax(scores / temperature, axis=1)


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, n_bins: int = 15) -> float:
    """Mean distance of confidence and share of right cells, over equal-width bins weighted by their cells.

    probabilities: float [n, C]; labels: int [n]. A bin holds the cells whose largest probability lies in
    (b / n_bins, (b + 1) / n_bins]. Raises InputError without cells or for labels that do not fit.
    """
    chances = np.asarray(probabilities, np.float64)
    truth = _checked(labels, chances)
    confidence = chances.max(axis=1)
    right = chances.argmax(axis=1) == truth
    bins = np.digitize(confidence, np.linspace(0, 1, n_bins + 1)[1:-1], right=True)
    surplus = np.bincount(bins, weights=confidence - right, minlength=n_bins)
    return float(np.abs(surplus).sum() / len(truth))


def _check_finite(scores: NDArray[np.float64]) -> None:
    n_bad = int((~np.isfinite(scores)).sum())
    if n_bad:
        raise ModelError(
            f"logits: found {n_bad:,} of {scores.size:,} values that are not finite; expected numbers; "
            "the model is damaged or its training diverged: train it again"
        )


def _checked(labels: ArrayLike, scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """The labels as int64 [n], one for each row of the scores [n, C]; InputError if they do not fit."""
    truth = np.asarray(labels)
    fits = (
        scores.ndim == 2 and truth.shape == scores.shape[:1] and truth.dtype.kind in "iu" and len(truth) > 0
    )
    if not fits or truth.min() < 0 or truth.max() >= scores.shape[1]:
        raise InputError(
            f"calibration: found scores of shape {scores.shape}, {truth.dtype} labels of shape {truth.shape};"
            " expected scores [n, C] and whole-number labels [n] from 0 to C - 1 of at least one cell; "
            "hold out labelled cells to calibrate on"
        )
    return truth.astype(np.int64)
