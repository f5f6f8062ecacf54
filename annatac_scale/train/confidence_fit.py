"""What a fine-tuning run learns of its own confidence, at its end: scaling, and what the model keeps of known cells.

train cells: means of the types, spread within them, and the stored references; at most MOST_CELLS of a type
val cells: the scaling of the logits, and the depth trends of the distances
calib cells: their scores alone, so that they stay exchangeable with cells that are still to come
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf

from annatac_scale.errors import ConfigError
from annatac_scale.model.calibration import (
    Scaling,
    expected_calibration_error,
    fit_temperature,
    fit_vector,
    fits_vector,
)
from annatac_scale.model.novelty import DISTANCES, SCORES, DepthTrend, KnownCells, Outputs
from annatac_scale.store.store import IslandStore
from annatac_scale.train.presets import CALIBRATIONS
from annatac_scale.train.splits import LabelledCells, cell_hashes

MOST_CELLS = 2000
"""Training cells of a type that means and spread are taken from, drawn by hash: bounds time and memory."""
REFERENCES = 200
"""Training cells of a type that are stored: the first of those."""

_LEAST_VARIANCE = 1e-6  # Of the mean variance: a layer norm leaves one direction without any.

Floats = NDArray[np.float32]
Codes = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Confidence:
    """scaling, known: for the model; errors: expected calibration error by split, "before" and "after" scaling."""

    scaling: Scaling
    known: KnownCells
    errors: dict[str, dict[str, float]]


def fit_confidence(
    outputs: Callable[[NDArray[np.int64]], Outputs],
    store: IslandStore,
    labelled: LabelledCells,
    calibration: str,
    seed: int,
    tested: tuple[Floats, Codes],
) -> Confidence:
    """Fit all of it.

    outputs: what the model says of labelled cells, in order of their ids
    calibration: one of CALIBRATIONS; "vector" is taken only with VECTOR_CELLS val cells of each type, else the
        temperature: ``scaling.kind`` tells
    tested: logits and codes of the test cells, below 0 where the model does not know the type
    """
    n_types = len(labelled.types)
    val, val_codes = labelled.of("val"), labelled.codes_of(labelled.of("val"))
    validated = outputs(val)
    scaling = fit_scaling(validated.logits, val_codes, calibration)
    drawn, stored = _drawn(store, labelled, seed)
    training = outputs(drawn).embedding
    known = _measure(training, labelled.codes_of(drawn), n_types, np.isin(drawn, stored))
    trends = {
        name: DepthTrend.fit(known.distance(name, validated.embedding), validated.n_open)
        for name in DISTANCES
    }
    known = replace(known, trends=trends)
    calib = labelled.of("calib")
    codes = labelled.codes_of(calib)
    said = outputs(calib)
    chances = scaling.probabilities(said.logits).astype(np.float32)
    known = replace(
        known,
        chances=chances[np.arange(len(codes)), codes],
        codes=codes.astype(np.int32),
        scores={name: np.sort(known.score(name, said, chances, scaling.temperature)) for name in SCORES},
    )
    errors = {"calib": _errors(said.logits, codes, scaling), "test": _errors(*tested, scaling)}
    return Confidence(scaling, known, {name: found for name, found in errors.items() if found})


def fit_scaling(logits: Floats, codes: Codes, calibration: str) -> Scaling:
    """The scaling fitted on some cells: see ``fit_confidence``. Raises ConfigError for another calibration."""
    if calibration not in CALIBRATIONS:
        raise ConfigError(f"calibration: found {calibration!r}, expected {' or '.join(CALIBRATIONS)}")
    if calibration == "vector" and fits_vector(codes, logits.shape[1]):
        return fit_vector(logits, codes)
    return Scaling(fit_temperature(logits, codes))


def _measure(embedding: Floats, codes: Codes, n_types: int, stored: NDArray[np.bool_]) -> KnownCells:
    """What distances are taken to; no trends and no calib cells yet."""
    means, whitening = means_and_whitening(embedding, codes, n_types)
    none = np.empty(0, np.float32)
    return KnownCells(means, whitening, embedding[stored], {}, none, none.astype(np.int32), {})


def means_and_whitening(embedding: Floats, codes: Codes, n_types: int) -> tuple[Floats, Floats]:
    """Mean of each type, float32 [C, M], and what makes the spread within types the identity, float32 [M, M].

    embedding: float32 [n, M]; codes: [n], every type at least once. The covariance is shared by the types and shrunk
    (Ledoit and Wolf 2004), as there may be fewer cells than channels.
    """
    cells = embedding.astype(np.float64)
    means = np.stack([cells[codes == code].mean(axis=0) for code in range(n_types)])
    off = cells - means[codes]
    if not off.any():  # One cell a type: no spread is known.
        return means.astype(np.float32), np.eye(cells.shape[1], dtype=np.float32)
    variances, axes = np.linalg.eigh(LedoitWolf(assume_centered=True).fit(off).covariance_)
    variances = np.maximum(variances, _LEAST_VARIANCE * variances.mean())
    return means.astype(np.float32), (axes / np.sqrt(variances)).astype(np.float32)


def _drawn(
    store: IslandStore, labelled: LabelledCells, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training cells that are looked at, and those of them that are stored, both increasing ids."""
    cells = labelled.of("train")
    cells = cells[np.argsort(cell_hashes(store.obs([]).iloc[cells], seed), kind="stable")]
    codes = labelled.codes_of(cells)
    of_types = [cells[codes == code] for code in range(len(labelled.types))]
    return (
        np.sort(np.concatenate([own[:MOST_CELLS] for own in of_types])),
        np.sort(np.concatenate([own[:REFERENCES] for own in of_types])),
    )


def _errors(logits: Floats, codes: Codes, scaling: Scaling) -> dict[str, float]:
    """Before and after scaling, over the cells of types that the model knows; empty without any."""
    known = codes >= 0
    if not known.any():
        return {}
    return {
        name: expected_calibration_error(by.probabilities(logits[known]), codes[known])
        for name, by in (("before", Scaling()), ("after", scaling))
    }
