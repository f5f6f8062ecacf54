"""What a fine-tuning run learns of its own confidence, at its end: scaling, and what the model keeps of known cells.

train cells: means of the types, spread within them, profiles, and the stored references; at most MOST_CELLS of a type
val cells: the scaling of the logits, and the depth trends; where a linear head has none, its training cells, each by a
    fit, by distances and by profiles that leave its fold out
calib cells: their scores alone, so that they stay exchangeable with cells that are still to come
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn.covariance import LedoitWolf

from annatac_scale.errors import ConfigError
from annatac_scale.model.calibration import (
    VECTOR_CELLS,
    Scaling,
    expected_calibration_error,
    fit_temperature,
    fit_vector,
    vector_types,
)
from annatac_scale.model.conformal import fewest_calib
from annatac_scale.model.novelty import SCORES, SPREADING, TRENDED, DepthTrend, KnownCells, Outputs
from annatac_scale.model.profiles import Profiles
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.train.cell_type_task import FinetuneTask
from annatac_scale.train.presets import CALIBRATIONS, FinetuneConfig
from annatac_scale.train.probe import IN_ALL
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
    """The training cells that are looked at, in order of their ids; places: in the order of hashes, int64 [n].

    task: reads their open islands
    """

    task: FinetuneTask
    cells: NDArray[np.int64]
    codes: Codes
    embedding: Floats
    n_open: NDArray[np.int64]
    places: NDArray[np.int64]

    def measure(self, chosen: NDArray[np.bool_], counts: NDArray[np.int32]) -> KnownCells:
        """What distances are taken to, of some of the cells, bool [n]; no trends and no calib cells yet.

        counts: as ``count`` has them, of these cells
        """
        profiles = Profiles.of(counts)
        _, codes = np.unique(self.codes[chosen], return_inverse=True)
        embedding = self.embedding[chosen]
        means, whitening = means_and_whitening(embedding, codes, int(codes.max()) + 1)
        stored = _first(self.places[chosen], codes, REFERENCES)
        none, no_codes = np.empty(0, np.float32), np.empty(0, np.int32)
        references = embedding[stored], codes[stored].astype(np.int32)
        return KnownCells(means, whitening, *references, profiles, {}, none, no_codes, {}, no_codes)

    def count(self, chosen: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Cells of each type in which each island is open, among some of them, bool [n]; int32 [N, C]."""
        counts = np.zeros((self.task.n_islands, int(self.codes.max()) + 1), np.int32)
        codes, start = self.codes[chosen], 0
        for rows in self.task.opened(self.cells[chosen]):
            own = codes[start : start + len(rows)]
            ones = np.ones(len(rows.islands), np.int32)
            opened = sparse.csr_array((ones, rows.islands, rows.offsets), shape=(len(rows), len(counts)))
            is_type = sparse.csr_array(
                (np.ones(len(own), np.int32), own, np.arange(len(own) + 1)),
                shape=(len(rows), counts.shape[1]),
            )
            found = (opened.T @ is_type).tocoo()
            counts[found.coords] += found.data
            start += len(rows)
        return counts


def fit_confidence(
    task: FinetuneTask,
    store: IslandStore,
    labelled: LabelledCells,
    config: FinetuneConfig,
    judged: Judged,
    said: Mapping[str, Outputs],
) -> Confidence:
    """Fit all of it.

    task: says what the model makes of labelled cells, and which of its islands are open in them
    config: its calibration "vector" is taken for types with VECTOR_CELLS judged cells, for others the temperature, and
        its novel_rate only with enough calib cells to tell what is so rare, else the paper's rule
    said: what the model says of the val, calib and test cells; nothing of profiles yet
    """
    truth = labelled.codes_of(judged.cells)
    scaling = fit_scaling(judged.logits, truth, config.calibration)
    notes = []
    if config.calibration == "vector" and not vector_types(truth, len(labelled.types)).all():
        notes.append(_no_vector(judged.on, truth, labelled.types))
    training = _training(task, store, labelled, config.train.seed)
    everyone = np.full(len(training.cells), True)
    counts = training.count(everyone)
    known = training.measure(everyone, counts)
    if judged.folds is None:
        val = _with_fit(said["val"], known.profiles, task.opened(judged.cells))
        raw, n_open = _raw(known, val, scaling.temperature), val.n_open
    else:
        raw, n_open = _out_of_fold(training, counts, judged, scaling.temperature)
    known = replace(
        known, trends={name: DepthTrend.fit(raw[name], n_open, name in SPREADING) for name in TRENDED}
    )
    cells = labelled.of("calib")
    codes, calib = labelled.codes_of(cells), _with_fit(said["calib"], known.profiles, task.opened(cells))
    chances = scaling.probabilities(calib.logits).astype(np.float32)
    known = replace(
        known,
        chances=chances[np.arange(len(codes)), codes],
        codes=codes.astype(np.int32),
        scores={name: known.score(name, calib, chances, scaling.temperature) for name in SCORES},
        n_open=calib.n_open.astype(np.int32),
    )
    errors = {
        split: _errors(said[split].logits, labelled.codes_of(labelled.of(split)), scaling)
        for split in ("calib", "test")
    }
    rate = config.novel_rate
    if rate is not None and known.n_calib < fewest_calib(rate):
        notes.append(_no_rate(rate, known.n_calib))
        rate = None
    told = {split: found for split, found in errors.items() if found}
    return Confidence(scaling, known, config.novelty, rate, told, notes)


def _no_vector(judged_on: str, codes: Codes, types: tuple[str, ...]) -> str:
    counts = np.bincount(codes, minlength=len(types))
    n_few = int((counts < VECTOR_CELLS).sum())
    return (
        f"calibration=vector: found {counts.min():,} {judged_on} cells of {types[int(counts.argmin())]!r}, "
        f"expected {VECTOR_CELLS} of each type; the temperature alone scales {n_few:,} of {len(types):,} types"
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
    if calibration == "vector" and vector_types(codes, logits.shape[1]).any():
        return fit_vector(logits, codes)
    return Scaling(fit_temperature(logits, codes))


def _with_fit(outputs: Outputs, profiles: Profiles, rows: Iterable[OpenIslands]) -> Outputs:
    """With how well the cells fit the profiles; rows: their open islands, some cells at a time."""
    return outputs._replace(fit=np.concatenate([np.empty(0, np.float32), *map(profiles.fit, rows)]))


def _raw(known: KnownCells, outputs: Outputs, temperature: float) -> dict[str, NDArray[np.float64]]:
    return {name: known.raw(name, outputs, temperature) for name in TRENDED}


def _out_of_fold(
    training: _Training, counts: NDArray[np.int32], judged: Judged, temperature: float
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
    """Scores of judged training cells beside what is left of the training cells without their fold, and their n_open.

    Judged cells that are not looked at have no part in it. counts: of all training cells
    """
    assert judged.folds is not None
    place = (
        pd.Series(np.arange(len(judged.cells)), judged.cells)
        .reindex(training.cells, fill_value=-1)
        .to_numpy()
    )
    fold_of = np.where(place >= 0, judged.folds[place], IN_ALL)
    raw = {name: np.full(len(fold_of), np.nan) for name in TRENDED}
    for fold in set(judged.folds.tolist()):
        out = fold_of == fold
        known = training.measure(~out, counts - training.count(out))
        said = Outputs(judged.logits[place[out]], training.embedding[out], training.n_open[out])
        said = _with_fit(said, known.profiles, training.task.opened(training.cells[out]))
        for name, found in _raw(known, said, temperature).items():
            raw[name][out] = found
    is_judged = fold_of != IN_ALL
    return {name: found[is_judged] for name, found in raw.items()}, training.n_open[is_judged]


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


def _training(task: FinetuneTask, store: IslandStore, labelled: LabelledCells, seed: int) -> _Training:
    cells = labelled.of("train")
    codes = labelled.codes_of(cells)
    places = np.argsort(np.argsort(cell_hashes(store.obs([]).iloc[cells], seed), kind="stable"))
    drawn = _first(places, codes, MOST_CELLS)
    said = task.outputs(cells[drawn])
    return _Training(task, cells[drawn], codes[drawn], said.embedding, said.n_open, places[drawn])


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
