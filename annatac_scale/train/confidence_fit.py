"""What a fine-tuning run learns of its own confidence, at its end: scaling, and what the model keeps of known cells.

train cells: means of the types, spread within them, and the stored references; at most MOST_CELLS of a type
val cells: the scaling of the logits, and the depth trends of the distances; where a linear head has none, its training
    cells, each by a fit and by distances that leave its fold out
calib cells: their scores alone, so that they stay exchangeable with cells that are still to come
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf

from annatac_scale.errors import ConfigError
from annatac_scale.model.calibration import (
    VECTOR_CELLS,
    Scaling,
    expected_calibration_error,
    fit_temperature,
    fit_vector,
    fits_vector,
)
from annatac_scale.model.conformal import fewest_calib
from annatac_scale.model.novelty import DISTANCES, PAPER_SCORE, SCORES, DepthTrend, KnownCells, Outputs
from annatac_scale.store.store import IslandStore
from annatac_scale.train.presets import CALIBRATIONS, FinetuneConfig
from annatac_scale.train.splits import LabelledCells, cell_hashes

MOST_CELLS = 2000
"""Training cells of a type that means and spread are taken from, drawn by hash: bounds time and memory."""
REFERENCES = 200
"""Training cells of a type that are stored: the first of those."""
OUT_OF_FOLD = "out-of-fold training"
"""Names the cells that judge a linear head without val cells: each by a fit that did not see it."""

_LEAST_VARIANCE = 1e-6  # Of the mean variance: a layer norm leaves one direction without any.

Floats = NDArray[np.float32]
Codes = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Judged:
    """Labelled cells that the fit did not see, and what it says of them: scaling and depth trends are fitted on them.

    on: which they are, "val" or OUT_OF_FOLD; cells: int64 [n], increasing ids; logits: [n, C]
    folds: int64 [n], which fold held out each where they are training cells, else None
    folds_of: what these are of, "cells" or whole groups of a column
    """

    on: str
    cells: NDArray[np.int64]
    logits: NDArray[np.floating]
    folds: NDArray[np.int64] | None = None
    folds_of: str = ""


@dataclass(frozen=True, eq=False)
class Confidence:
    """What the model is told of it.

    novelty, novel_rate: its own rule, as in FinetuneConfig; errors: expected calibration error by split, "before" and
        "after" scaling; notes: sentences on what was asked for and takes more cells
    """

    scaling: Scaling
    known: KnownCells
    novelty: str
    novel_rate: float | None
    errors: dict[str, dict[str, float]]
    notes: list[str]


@dataclass(frozen=True, eq=False)
class _Training:
    """The training cells that are looked at, in order of their ids; places: in the order of hashes, int64 [n]."""

    cells: NDArray[np.int64]
    codes: Codes
    embedding: Floats
    n_open: NDArray[np.int64]
    places: NDArray[np.int64]

    def measure(self, chosen: NDArray[np.bool_]) -> KnownCells:
        """What distances are taken to, of some of the cells, bool [n]; no trends and no calib cells yet."""
        _, codes = np.unique(self.codes[chosen], return_inverse=True)
        embedding = self.embedding[chosen]
        means, whitening = means_and_whitening(embedding, codes, int(codes.max()) + 1)
        stored = _first(self.places[chosen], codes, REFERENCES)
        none, no_codes = np.empty(0, np.float32), np.empty(0, np.int32)
        references = embedding[stored], codes[stored].astype(np.int32)
        return KnownCells(means, whitening, *references, {}, none, no_codes, {}, no_codes)


def fit_confidence(
    outputs: Callable[[NDArray[np.int64]], Outputs],
    store: IslandStore,
    labelled: LabelledCells,
    config: FinetuneConfig,
    judged: Judged,
    said: Mapping[str, Outputs],
) -> Confidence:
    """Fit all of it.

    outputs: what the model says of labelled cells, in order of their ids
    config: its calibration "vector" is taken only with VECTOR_CELLS judged cells of each type, else the temperature,
        and its novel_rate only with enough calib cells to tell what is so rare, else the paper's rule
    said: what the model says of the val, calib and test cells
    """
    truth = labelled.codes_of(judged.cells)
    scaling = fit_scaling(judged.logits, truth, config.calibration)
    notes = []
    if scaling.kind != config.calibration:
        notes.append(_no_vector(judged.on, truth, labelled.types))
    training = _training(outputs, store, labelled, config.train.seed)
    known = training.measure(np.full(len(training.cells), True))
    if judged.folds is None:
        distances, n_open = _distances(known, said["val"].embedding), said["val"].n_open
    else:
        distances, n_open = _out_of_fold(training, judged.cells, judged.folds)
    trends = {name: DepthTrend.fit(distances[name], n_open) for name in DISTANCES}
    known = replace(known, trends=trends)
    codes = labelled.codes_of(labelled.of("calib"))
    chances = scaling.probabilities(said["calib"].logits).astype(np.float32)
    known = replace(
        known,
        chances=chances[np.arange(len(codes)), codes],
        codes=codes.astype(np.int32),
        scores={name: known.score(name, said["calib"], chances, scaling.temperature) for name in SCORES},
        n_open=said["calib"].n_open.astype(np.int32),
    )
    errors = {
        split: _errors(said[split].logits, labelled.codes_of(labelled.of(split)), scaling)
        for split in ("calib", "test")
    }
    novelty, rate = config.novelty, config.novel_rate
    if rate is not None and known.n_calib < fewest_calib(rate):
        notes.append(_no_rate(rate, known.n_calib))
        novelty, rate = PAPER_SCORE, None
    told = {split: found for split, found in errors.items() if found}
    return Confidence(scaling, known, novelty, rate, told, notes)


def _no_vector(judged_on: str, codes: Codes, types: tuple[str, ...]) -> str:
    counts = np.bincount(codes, minlength=len(types))
    return (
        f"calibration=vector: found {counts.min():,} {judged_on} cells of {types[int(counts.argmin())]!r}, "
        f"expected {VECTOR_CELLS} of each type; one temperature is fitted instead"
    )


def _no_rate(rate: float, n_calib: int) -> str:
    return (
        f"novel_rate={rate:g}: found {n_calib:,} calib cells, expected at least {fewest_calib(rate):,} to tell what is "
        "so rare; the model calls novel what has a low confidence instead"
    )


def fit_scaling(logits: NDArray[np.floating], codes: Codes, calibration: str) -> Scaling:
    """The scaling fitted on some cells: see ``fit_confidence``. Raises ConfigError for another calibration."""
    if calibration not in CALIBRATIONS:
        raise ConfigError(f"calibration: found {calibration!r}, expected {' or '.join(CALIBRATIONS)}")
    if calibration == "vector" and fits_vector(codes, logits.shape[1]):
        return fit_vector(logits, codes)
    return Scaling(fit_temperature(logits, codes))


def _distances(known: KnownCells, embedding: Floats) -> dict[str, NDArray[np.float64]]:
    return {name: known.distance(name, embedding) for name in DISTANCES}


def _out_of_fold(
    training: _Training, cells: NDArray[np.int64], folds: NDArray[np.int64]
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
    """Distances of judged training cells to what is left of the training cells without their fold, and their n_open.

    cells, folds: as in ``Judged``; those of the cells that are not looked at have no part in it.
    """
    fold_of = pd.Series(folds, cells).reindex(training.cells).to_numpy()  # NaN for a cell that is in all fits
    distances = {name: np.full(len(fold_of), np.nan) for name in DISTANCES}
    for fold in set(folds.tolist()):
        out = fold_of == fold
        for name, found in _distances(training.measure(~out), training.embedding[out]).items():
            distances[name][out] = found
    is_judged = ~np.isnan(fold_of)
    return {name: found[is_judged] for name, found in distances.items()}, training.n_open[is_judged]


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


def _training(
    outputs: Callable[[NDArray[np.int64]], Outputs], store: IslandStore, labelled: LabelledCells, seed: int
) -> _Training:
    cells = labelled.of("train")
    codes = labelled.codes_of(cells)
    places = np.argsort(np.argsort(cell_hashes(store.obs([]).iloc[cells], seed), kind="stable"))
    drawn = _first(places, codes, MOST_CELLS)
    said = outputs(cells[drawn])
    return _Training(cells[drawn], codes[drawn], said.embedding, said.n_open, places[drawn])


def _first(places: NDArray[np.int64], codes: Codes, most: int) -> NDArray[np.bool_]:
    """Whether each cell is among the ``most`` of its type that come first, bool [n]."""
    first: NDArray[np.bool_] = (pd.Series(places).groupby(codes).rank() <= most).to_numpy()
    return first


def _errors(logits: Floats, codes: Codes, scaling: Scaling) -> dict[str, float]:
    """Before and after scaling, over the cells of types that the model knows; empty without any."""
    known = codes >= 0
    if not known.any():
        return {}
    return {
        name: expected_calibration_error(by.probabilities(logits[known]), codes[known])
        for name, by in (("before", Scaling()), ("after", scaling))
    }
