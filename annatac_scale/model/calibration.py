"""How sure a prediction is: the scaling of a model's logits, its probabilities, and how far to trust them.

The probabilities are softmax(logits / T). T is one number, fitted on labelled cells that training did not
see, so that of the cells whose best type has probability p a share of about p is right (Guo et al., ICML
2017). It never changes which type is best. Vector scaling, from the same paper, gives each type a factor and a bias
of its own: softmax(a x logits + b). It has 2 numbers a type to fit, for each type that has cells enough for them, and
may change the best type.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp, softmax

from annatac_scale.errors import InputError, ModelError

# Where the best type is always right, the likelihood rises without end as T falls: hence bounds.
TEMPERATURE_BOUNDS = (0.05, 20.0)

_BIAS_BOUND = 20.0

BINS = 15
"""Bins of confidence, of equal width, that a calibration error is taken over."""

VECTOR_CELLS = 20
"""Cells that a type must have for numbers of its own in vector scaling: 10 for each of the two."""


@dataclass(frozen=True)
class Scaling:
    """How logits become probabilities: softmax(logits / temperature), or softmax(scales x logits + biases).

    scales, biases: one of each a type; both empty where the temperature alone scales. Raises ModelError for a
    temperature or scale that is not a number above 0, or a bias that is not finite.
    """

    temperature: float = 1.0
    scales: tuple[float, ...] = ()
    biases: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.temperature < np.inf:
            raise ModelError(
                f"temperature: found {self.temperature}; expected a number above 0; finetune the model again"
            )
        fits = len(self.scales) == len(self.biases) and np.isfinite(self.biases).all()
        if not fits or not all(0 < scale < np.inf for scale in self.scales):
            raise ModelError(
                f"vector scaling: found scales {self.scales} and biases {self.biases}; expected as many of each, "
                "scales above 0; finetune the model again"
            )

    @property
    def kind(self) -> str:
        """ "temperature" or "vector"."""
        return "vector" if self.scales else "temperature"

    def scaled(self, logits: ArrayLike) -> NDArray[np.float64]:
        """What the softmax is taken of, float64 [n, C]; ModelError for logits that are not finite or do not fit."""
        scores = np.asarray(logits, np.float64)
        _check_finite(scores)
        if not self.scales:
            return scores / self.temperature
        if scores.ndim != 2 or scores.shape[1] != len(self.scales):
            raise ModelError(
                f"vector scaling: found logits of shape {scores.shape}, expected [n, {len(self.scales)}]; "
                "finetune the model again"
            )
        return scores * np.array(self.scales) + np.array(self.biases)

    def probabilities(self, logits: ArrayLike) -> NDArray[np.float64]:
        """The softmax of each row, float64 [n, C]; raises as ``scaled``."""
        return softmax(self.scaled(logits), axis=1)


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature in TEMPERATURE_BOUNDS that minimises the cross-entropy with smoothed labels.

    The true type's target is (n + 1) / (n + 2), the rest is spread over the other types (after Platt 1999): few cells,
    all of them right, are no proof of certainty. With many cells this is the negative log-likelihood.

    logits: float [n, C]; labels: int [n], 0 to C - 1. A likelihood that no temperature betters gives 1.0.
    Raises InputError without cells or for labels that do not fit the logits, ModelError for logits that are not
    finite.
    """
    scores, targets = _targets(logits, labels)
    expected = (scores * targets).sum(axis=1)

    def loss(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        return float(np.mean(logsumexp(scores * inverse, axis=1) - expected * inverse))

    low, high = np.log(TEMPERATURE_BOUNDS)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    # Less than this is rounding, as where all logits of a cell are equal.
    return float(np.exp(found.x)) if found.fun < loss(0.0) - 1e-12 else 1.0


def vector_types(labels: ArrayLike, n_types: int) -> NDArray[np.bool_]:
    """Which of the types have cells enough for numbers of their own, bool [n_types]. labels: int [n]"""
    enough: NDArray[np.bool_] = np.bincount(np.asarray(labels, np.int64), minlength=n_types) >= VECTOR_CELLS
    return enough


def fit_vector(logits: ArrayLike, labels: ArrayLike) -> Scaling:
    """Vector scaling that minimises the cross-entropy with the smoothed labels of ``fit_temperature``.

    It starts from the fitted temperature, which the result keeps, and stays there for types that are not among
    ``vector_types``; scales lie within the same bounds; the biases, of which the softmax knows the differences alone,
    sum to 0. Arguments and errors as for ``fit_temperature``.
    """
    temperature = fit_temperature(logits, labels)
    scores, targets = _targets(logits, labels)
    n_types = scores.shape[1]
    fitted = np.tile(vector_types(labels, n_types), 2)

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scales, biases = np.exp(parameters[:n_types]), parameters[n_types:]
        scaled = scores * scales + biases
        totals = logsumexp(scaled, axis=1)
        surplus = np.exp(scaled - totals[:, None]) - targets
        slope = np.concatenate([(surplus * scores).mean(axis=0) * scales, surplus.mean(axis=0)])
        return float(np.mean(totals - (targets * scaled).sum(axis=1))), slope * fitted

    start = np.concatenate([np.full(n_types, -np.log(temperature)), np.zeros(n_types)])
    low, high = np.log(TEMPERATURE_BOUNDS)
    bounds = [(-high, -low)] * n_types + [(-_BIAS_BOUND, _BIAS_BOUND)] * n_types
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 1000})
    scales, biases = np.exp(found.x[:n_types]), found.x[n_types:]
    return Scaling(temperature, tuple(scales.tolist()), tuple((biases - biases.mean()).tolist()))


def probabilities(logits: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """softmax(logits / temperature) of each row, float64 [n, C].

    Raises ModelError for logits that are not finite or a temperature that is not a number above 0.
    """
    return Scaling(temperature).probabilities(logits)


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, n_bins: int = BINS) -> float:
    """Mean distance of confidence and share of right cells, over equal-width bins weighted by their cells.

    probabilities: float [n, C]; labels: int [n]. Bins are those of ``confidence_bins``. Raises InputError without cells
    or for labels that do not fit.
    """
    chances = np.asarray(probabilities, np.float64)
    truth = _checked(labels, chances)
    confidence = chances.max(axis=1)
    right = chances.argmax(axis=1) == truth
    surplus = np.bincount(confidence_bins(confidence, n_bins), weights=confidence - right, minlength=n_bins)
    return float(np.abs(surplus).sum() / len(truth))


def confidence_bins(confidence: NDArray[np.floating], n_bins: int = BINS) -> NDArray[np.int64]:
    """Number of each cell's bin, int64 [n]: b where (b / n_bins, (b + 1) / n_bins] holds its confidence; 0 for 0."""
    bins: NDArray[np.int64] = np.digitize(confidence, np.linspace(0, 1, n_bins + 1)[1:-1], right=True)
    return bins


def _targets(logits: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The logits, checked, and the smoothed labels, both float64 [n, C]."""
    scores = np.asarray(logits, np.float64)
    truth = _checked(labels, scores)
    _check_finite(scores)
    n, n_types = scores.shape
    if n_types == 1:
        return scores, np.ones((n, 1))
    doubt = 1 / (n + 2)
    targets = np.full((n, n_types), doubt / (n_types - 1))
    targets[np.arange(n), truth] = 1 - doubt
    return scores, targets


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
