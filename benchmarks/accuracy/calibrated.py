"""Calibration: ECE beside the band of a calibrated model of as many cells, and coverage of conformal sets."""

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score

from annatac_scale.annotate.reliability import Calibration, calibration, set_coverage
from annatac_scale.model.calibration import fit_temperature, fit_vector, probabilities
from annatac_scale.model.conformal import set_thresholds

COVERAGES = (0.9, 0.95)
"""Shares of cells whose prediction set shall hold their type."""

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


def judged(calib: tuple[Floats, Ints], test: tuple[Floats, Ints]) -> dict[str, float]:
    """Figures of the test cells with temperature and thresholds of the calibration cells.

    calib, test: logits [n, types] and codes [n] of known types
    ece, ece_raw: with and without the temperature; ece_band: below which a perfectly calibrated model's ECE stays
    ece_vector, ece_vector_band, accuracy, accuracy_vector, macro_f1, macro_f1_vector: the same with vector scaling, and
    what either calls right, as vector scaling changes the best type
    coverage_90, sets_90 and so on: share of cells whose set holds their type, types in a mean set; the limit is that of
    all cells together
    """
    temperature = fit_temperature(*calib)
    known, chances = (probabilities(logits, temperature).astype(np.float32) for logits, _ in (calib, test))
    after = _calibration(chances, test[1])
    figures = {
        "n_calib": len(calib[1]),
        "n_test": len(test[1]),
        "temperature": temperature,
        "ece": after.error,
        "ece_raw": _calibration(probabilities(test[0], 1.0), test[1]).error,
        "ece_band": after.band.high,
    }
    by_vector = fit_vector(*calib).probabilities(test[0])
    vector = _calibration(by_vector, test[1])
    figures |= {"ece_vector": vector.error, "ece_vector_band": vector.band.high}
    for end, said in (("", chances), ("_vector", by_vector)):
        figures[f"accuracy{end}"] = accuracy_score(test[1], said.argmax(axis=1))
        figures[f"macro_f1{end}"] = f1_score(
            test[1], said.argmax(axis=1), average="macro", labels=np.unique(test[1])
        )
    own = known[np.arange(len(known)), calib[1]]
    for coverage in COVERAGES:
        limits = set_thresholds(own, calib[1], known.shape[1], coverage, per_class=False)
        found = set_coverage(chances >= limits, test[1])
        figures[f"coverage_{coverage:.0%}".rstrip("%")] = found.coverage
        figures[f"sets_{coverage:.0%}".rstrip("%")] = found.mean_size
    return {key: round(float(value), 5) for key, value in figures.items()}


def _calibration(chances: Floats, codes: Ints) -> Calibration:
    return calibration(chances.max(axis=1), chances.argmax(axis=1) == codes)
