"""Calibration: ECE beside that of a calibrated model of as many cells, and coverage of conformal prediction sets."""

import numpy as np
from numpy.typing import NDArray

from annatac_scale.model.calibration import expected_calibration_error, fit_temperature, probabilities

MISSES = (0.1, 0.05)
"""Shares of cells whose prediction set may miss their type."""
SIMULATED = 1_000
N_BINS = 15

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


def judged(
    calib: tuple[Floats, Ints], test: tuple[Floats, Ints], temperature: float | None = None
) -> dict[str, float]:
    """Figures of the test cells with temperature and thresholds of the calibration cells.

    calib, test: logits [n, types] and codes [n] of known types; temperature: a fitted one, else fitted here
    ece, ece_raw: with and without the temperature; ece_band: what 95% of calibrated models with these confidences
    stay below; coverage_90, sets_90 and so on: share of cells whose set holds their type, types in a mean set
    """
    temperature = fit_temperature(*calib) if temperature is None else temperature
    chances = probabilities(test[0], temperature)
    figures = {
        "n_calib": len(calib[1]),
        "n_test": len(test[1]),
        "temperature": temperature,
        "ece": expected_calibration_error(chances, test[1], N_BINS),
        "ece_raw": expected_calibration_error(probabilities(test[0], 1.0), test[1], N_BINS),
        "ece_band": ece_band(chances.max(axis=1)),
    }
    known = probabilities(calib[0], temperature)
    for miss in MISSES:
        name = round(100 * (1 - miss))
        sets = conformal_sets(known, calib[1], chances, miss)
        figures[f"coverage_{name}"] = float(sets[np.arange(len(sets)), test[1]].mean())
        figures[f"sets_{name}"] = float(sets.sum(axis=1).mean())
    return {key: round(float(value), 5) for key, value in figures.items()}


def ece_band(confidence: Floats, seed: int = 0) -> float:
    """The 95% quantile of the ECE of models whose best type is right with just this probability. confidence: [n]"""
    rng = np.random.default_rng(seed)
    bins = np.digitize(confidence, np.linspace(0, 1, N_BINS + 1)[1:-1], right=True)
    order = np.argsort(bins, kind="stable")
    starts = np.unique(bins[order], return_index=True)[1]
    found = []
    for _ in range(SIMULATED):
        surplus = confidence - (rng.random(len(confidence)) < confidence)
        found.append(np.abs(np.add.reduceat(surplus[order], starts)).sum() / len(confidence))
    return float(np.quantile(found, 0.95))


def conformal_sets(calib: Floats, codes: Ints, asked: Floats, miss: float) -> NDArray[np.bool_]:
    """Split conformal prediction: the types whose probability is large enough, bool [n, types].

    calib, asked: probabilities; codes: of the calibration cells. The threshold is the ceil((n + 1)(1 - miss))-th
    smallest of one less the true type's probability; with too few cells for it, every type is in the set.
    """
    n = len(codes)
    rank = int(np.ceil((n + 1) * (1 - miss)))
    if rank > n:
        return np.ones(asked.shape, bool)
    threshold = np.sort(1 - calib[np.arange(n), codes])[rank - 1]
    return 1 - asked <= threshold
