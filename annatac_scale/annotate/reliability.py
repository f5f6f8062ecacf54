"""Whether a model knows what it knows: confidence against the share right, novelty scores, prediction sets."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score, roc_curve

from annatac_scale.annotate.bootstrap import DRAWS, LEVEL, SEED, Interval, share_interval
from annatac_scale.errors import InputError
from annatac_scale.model.calibration import BINS, confidence_bins

TPR = 0.95
"""Share of the novel cells that are found where the false positive rate is read."""

_FINE = 200
"""Parts of a bin whose cells are simulated together."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Confidence against share right.

    error: expected calibration error, the mean distance of both over the bins, weighted by their cells
    band: 95% of the errors that a perfectly calibrated model of these very confidences would show by chance
    bins: one row a bin that has cells: low, high (of confidence), n, confidence (mean), right (share), and band_low,
        band_high: 95% of the shares right of a perfectly calibrated model
    """

    n_cells: int
    error: float
    band: Interval
    bins: pd.DataFrame

    @property
    def within_band(self) -> bool:
        """Whether the error is no larger than chance explains."""
        return self.error <= self.band.high

    def to_dict(self) -> dict[str, Any]:
        """All of it in the types of JSON."""
        return {
            "n_cells": self.n_cells,
            "error": self.error,
            "band": list(self.band),
            "within_band": self.within_band,
            "bins": self.bins.to_dict("records"),
        }


def calibration(
    confidence: ArrayLike, right: ArrayLike, n_bins: int = BINS, n_draws: int = DRAWS, seed: int = SEED
) -> Calibration:
    """The calibration of predictions, beside that of a perfectly calibrated model.

    confidence: float [n], 0 to 1: the probability of the predicted type; right: bool [n]: whether it is the true one
    Bins are those of ``confidence_bins``.

    The band is simulated: cell i is right with probability confidence_i, which is what perfectly calibrated means, so
    that the band holds for these confidences and this n, few cells a bin included, where no formula for large n does.
    Cells of a 200th of a bin are drawn together, with their mean confidence: that adds at most 3e-8 a cell to the
    variance. Raises InputError without cells, for unequal lengths or a confidence outside 0 to 1.
    """
    sure, hits = np.asarray(confidence, np.float64), np.asarray(right, np.bool_)
    if (
        sure.shape != hits.shape
        or sure.ndim != 1
        or not len(sure)
        or not (sure >= 0).all()
        or (sure > 1).any()
    ):
        raise InputError(
            f"calibration: found confidences of shape {sure.shape} and outcomes of shape {hits.shape}; expected one of "
            "each of at least one cell, confidences from 0 to 1; give the probability of each cell's label"
        )
    sums = ConfidenceSums(n_bins)
    sums.add(sure, hits)
    return sums.calibration(n_draws, seed)


class ConfidenceSums:
    """What the calibration of predictions is made of, in bins: any number of cells, of which none is kept."""

    def __init__(self, n_bins: int = BINS) -> None:
        self._n_bins = n_bins
        self._n = np.zeros(n_bins * _FINE, np.int64)
        self._sum = np.zeros(n_bins * _FINE)
        self._right = np.zeros(n_bins)

    def __len__(self) -> int:
        return int(self._n.sum())

    def add(self, confidence: NDArray[np.floating], right: NDArray[np.bool_]) -> None:
        """Add cells. confidence: float [n], 0 to 1; right: bool [n]

        Sums are those of one array with all cells, bit by bit: they are added one by one, in their order.
        """
        sure = confidence.astype(np.float64)
        bin_of = confidence_bins(sure, self._n_bins)
        part_of = np.clip(((sure * self._n_bins - bin_of) * _FINE).astype(np.int64), 0, _FINE - 1)
        fine = bin_of * _FINE + part_of
        np.add.at(self._n, fine, 1)
        np.add.at(self._sum, fine, sure)
        np.add.at(self._right, bin_of, right.astype(np.float64))

    def calibration(self, n_draws: int = DRAWS, seed: int = SEED) -> Calibration:
        """The calibration of all cells, at least one, as ``calibration`` has it."""
        n, n_bins, n_cells = self._n, self._n_bins, len(self)
        mean = self._sum / np.maximum(n, 1)
        used = np.flatnonzero(n)
        drawn = np.random.default_rng(seed).binomial(n[used], np.minimum(mean[used], 1), (n_draws, len(used)))
        coarse, starts = np.unique(used // _FINE, return_index=True)
        drawn_right = np.add.reduceat(drawn, starts, axis=1)
        n_of_bin = np.add.reduceat(n[used], starts)
        expected = np.add.reduceat(n[used] * mean[used], starts)
        n_right = self._right[coarse]
        tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        errors = np.abs(drawn_right - expected).sum(axis=1) / n_cells
        low, high = np.quantile(drawn_right / n_of_bin, tails, axis=0)
        bins = pd.DataFrame(
            {
                "low": coarse / n_bins,
                "high": (coarse + 1) / n_bins,
                "n": n_of_bin,
                "confidence": expected / n_of_bin,
                "right": n_right / n_of_bin,
                "band_low": low,
                "band_high": high,
            }
        )
        error = float(np.abs(n_right - expected).sum() / n_cells)
        return Calibration(n_cells, error, Interval(*map(float, np.quantile(errors, tails))), bins)


@dataclass(frozen=True)
class NoveltyFigures:
    """How well a score tells novel from known cells.

    auroc: chance that a novel cell scores above a known one, ties half; fpr_at_95_tpr: share of the known cells above
    the highest threshold that finds at least 95% of the novel ones
    """

    n_novel: int
    n_known: int
    auroc: float
    fpr_at_95_tpr: float


def novelty_figures(score: ArrayLike, novel: ArrayLike) -> NoveltyFigures:
    """Figures of a novelty score.

    score: float [n], higher where a cell is more likely novel; novel: bool [n], the truth
    Raises InputError for scores that are not finite, and without a cell of each kind.
    """
    scores, truth = np.asarray(score), np.asarray(novel, np.bool_)
    if scores.dtype != np.float32:  # which is half the memory, and orders cells as well
        scores = scores.astype(np.float64)
    n_novel = int(truth.sum())
    if scores.shape != truth.shape or not np.isfinite(scores).all() or not 0 < n_novel < len(truth):
        raise InputError(
            f"novelty: found {len(scores):,} scores, {int(np.isfinite(scores).sum()):,} of them finite, of {n_novel:,} "
            f"novel and {len(truth) - n_novel:,} known cells; expected a finite score of each, and cells of both kinds"
        )
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    return NoveltyFigures(
        n_novel=n_novel,
        n_known=len(truth) - n_novel,
        auroc=float(roc_auc_score(truth, scores)),
        fpr_at_95_tpr=float(fpr[tpr >= TPR].min()),
    )


@dataclass(frozen=True)
class Coverage:
    """Prediction sets: how many hold the true type, and how large they are.

    coverage: share of the cells whose set holds their type; interval: exact binomial, 95%
    mean_size: types in a set; n_empty: sets without a type
    """

    n_cells: int
    coverage: float
    interval: Interval
    mean_size: float
    n_empty: int

    @classmethod
    def of_counts(cls, n_cells: int, n_covered: int, n_types: int, n_empty: int) -> "Coverage":
        """n_covered: cells whose set holds their type; n_types: types in all sets; n_empty: sets without a type."""
        return cls(
            n_cells=n_cells,
            coverage=n_covered / n_cells,
            interval=share_interval(n_covered, n_cells),
            mean_size=n_types / n_cells,
            n_empty=n_empty,
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it in the types of JSON."""
        return {
            "n_cells": self.n_cells,
            "coverage": self.coverage,
            "interval": list(self.interval),
            "mean_size": self.mean_size,
            "n_empty": self.n_empty,
        }


def set_coverage(members: ArrayLike, codes: ArrayLike) -> Coverage:
    """Coverage of prediction sets.

    members: bool [n, C], whether a type is in the cell's set; codes: int [n], the true type, below 0 where it is none
    of the C, which no set can hold. Raises InputError without cells, or where they do not fit.
    """
    held, truth = np.asarray(members, np.bool_), np.asarray(codes)
    if held.ndim != 2 or truth.shape != held.shape[:1] or not len(truth) or truth.max() >= held.shape[1]:
        raise InputError(
            f"prediction sets: found members of shape {held.shape} and true types of shape {truth.shape}; expected "
            "[cells, types] and [cells], codes below the number of types, of at least one cell"
        )
    covered = held[np.arange(len(truth)), truth] & (truth >= 0)
    sizes = held.sum(axis=1)
    return Coverage.of_counts(len(truth), int(covered.sum()), int(sizes.sum()), int((sizes == 0).sum()))
