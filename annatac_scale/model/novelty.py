"""How unlike the known cells a cell is: six scores, each larger for more novel cells.

    max_probability   1 - the largest probability: what annATAC's rule looks at (Hendrycks and Gimpel, ICLR 2017)
    energy            -T logsumexp(logits / T), T the temperature (Liu et al., NeurIPS 2020)
    mahalanobis       distance of the embedding to the nearest mean of a type, in units of the spread within types (Lee
                      et al., NeurIPS 2018)
    knn               distance of the embedding within which one in ONE_IN of the stored training cells of a type lie,
                      of the nearest type (as Sun et al., ICML 2022, but by type and of embeddings as they are)
    profile           how badly a cell's open islands fit the profile of the type that they fit best (model/profiles.py)
    joint             the sum of energy and profile: the one sees a cell that stands between the types, the other one
                      that is far from all of them

Distances depend on a cell's depth, the number of its open islands: the embedding of a shallow cell is noisier. Those
of DISTANCES are therefore given as what they are above the line that held-out cells follow in log(n_open), in standard
deviations around it: 0 is usual for a known cell of that depth. Of "profile" the deviation too is that of cells as
deep. "joint" adds energy in the same units. The first two are as published.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from annatac_scale.errors import ConfigError, ModelError
from annatac_scale.model.profiles import Profiles

SCORES = ("max_probability", "energy", "mahalanobis", "knn", "profile", "joint")
PAPER_SCORE = "max_probability"
"""The score that a novel threshold is of: 1 - confidence."""

DISTANCES = ("mahalanobis", "knn", "profile")
"""Those that look at the cell itself and not at how sure the model is, corrected for depth."""
SHIFTING = (*DISTANCES, "joint")
"""Those that shift as a whole with a donor or a batch, so that a sample's own median can be taken off."""
TRENDED = ("energy", *DISTANCES)
"""Those of which there is a depth trend."""
PROFILED = ("profile", "joint")
"""Those that look at the profiles."""

ONE_IN = 20
"""Part of a type's stored cells, rounded up, whose farthest "knn" measures to: of 200 the 10th nearest.

One number for all types would reach across a type of few cells, or into another.
"""

FEWEST_FOR_SLOPE = 20
"""Cells that a depth trend with a slope takes: of fewer the slope is mostly noise, and a line through two is exact."""
FEWEST_FOR_SPREAD = 100
"""Cells that a spread which follows depth takes: of squared residuals a slope is noisier."""
SPREADING = ("profile",)
"""Those whose spread follows depth: a mean over the open islands is the less noisy, the more there are."""

_LEAST_SQUARE = 1e-6  # Of the mean: a residual of 0 has no logarithm.
_CHUNK = 512  # Cells that are compared with the stored cells of a type at a time: bounds the memory.

Floats = NDArray[np.float32]


def checked_score(name: str) -> str:
    """``name``, if it is one of SCORES. Raises ConfigError otherwise."""
    if name not in SCORES:
        raise ConfigError(f"novelty score: found {name!r}, expected {', '.join(SCORES)}")
    return name


class Outputs(NamedTuple):
    """What a model says of n cells: logits float32 [n, C], embedding float32 [n, M]; and their n_open int64 [n].

    fit: float32 [n], how well they fit the nearest profile; None where no score looks at it
    """

    logits: Floats
    embedding: Floats
    n_open: NDArray[np.int64]
    fit: Floats | None = None


@dataclass(frozen=True)
class DepthTrend:
    """The line in log(1 + n_open) that a distance of known cells follows.

    spread, narrowing: the standard deviation around it is spread * exp(-narrowing * log(1 + n_open))
    low, high: of log(1 + n_open) among the cells that it was fitted on, beyond which line and deviation are level
    All are rounded to float32, as they are stored.
    """

    intercept: float
    slope: float
    spread: float
    narrowing: float
    low: float
    high: float

    @classmethod
    def fit(
        cls, scores: NDArray[np.float64], n_open: NDArray[np.int64], spreading: bool = False
    ) -> "DepthTrend":
        """By least squares. scores: [n], NaN for cells that have none; n_open: [n]; spreading: whether to fit narrowing

        The line is level where all cells are as deep, or where there are fewer than FEWEST_FOR_SLOPE; the deviation
        also where there are fewer than FEWEST_FOR_SPREAD. Where no cell has a score, the line is 0, the deviation 1.
        """
        found = ~np.isnan(scores)
        if not found.any():
            return cls(0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
        scores, n_open = scores[found], n_open[found]
        depth = np.log1p(n_open.astype(np.float64))
        off = depth - depth.mean()
        # By the counts: of equal depths the mean may be a rounding off.
        sloped = len(scores) >= FEWEST_FOR_SLOPE and n_open.min() < n_open.max()
        slope = float(off @ scores) / float(off @ off) if sloped else 0.0
        intercept = float(scores.mean()) - slope * float(depth.mean())
        residuals = scores - intercept - slope * depth
        narrowing = 0.0
        if spreading and sloped and len(scores) >= FEWEST_FOR_SPREAD and residuals.any():
            # The slope of the logarithm of what lies around the line; Harvey, Econometrica 1976.
            squares = residuals**2
            logs = np.log(np.maximum(squares, _LEAST_SQUARE * squares.mean()))
            narrowing = -float(off @ logs) / float(off @ off) / 2
        level = residuals * np.exp(narrowing * depth)
        # Less one for each number that the line has of its own; one cell has no spread.
        spread = float(np.sqrt(level @ level / max(len(scores) - (2 if sloped else 1), 1)))
        # Where all cells score the same, their score is 0 and any other is far off.
        fitted = (intercept, slope, max(spread, 1e-6), narrowing, depth.min(), depth.max())
        return cls(*(float(np.float32(number)) for number in fitted))

    def corrected(self, scores: NDArray[np.float64], n_open: NDArray[np.int64]) -> NDArray[np.float64]:
        """What the scores [n] are above the line, in units of the deviation at that depth."""
        depth = np.clip(np.log1p(n_open.astype(np.float64)), self.low, self.high)
        return (scores - self.intercept - self.slope * depth) / self.spread * np.exp(self.narrowing * depth)


@dataclass(frozen=True, eq=False)
class KnownCells:
    """What a fine-tuned model keeps of the cells that it knows; C types, M channels of the embedding.

    means: float32 [C, M], of the embeddings of training cells; whitening: float32 [M, M], which makes the spread within
        types the identity: distances are those of embedding @ whitening
    references: float32 [R, M], embeddings of some training cells of each type; reference_codes: int32 [R], those types
    profiles: of the training cells
    trends: the depth trend of each of TRENDED, fitted on the val cells
    chances: float32 [n], the probability of the true type of each calib cell; codes: int32 [n], those types
    scores: float32 [n] for each of SCORES, of the calib cells; n_open: int32 [n], theirs
    """

    means: Floats
    whitening: Floats
    references: Floats
    reference_codes: NDArray[np.int32]
    profiles: Profiles
    trends: Mapping[str, DepthTrend]
    chances: Floats
    codes: NDArray[np.int32]
    scores: Mapping[str, Floats]
    n_open: NDArray[np.int32]

    @property
    def n_calib(self) -> int:
        """Calib cells."""
        return len(self.codes)

    def of_depth(self, min_open: int) -> "KnownCells":
        """The same with the calib cells that have ``min_open`` open islands or more."""
        deep = self.n_open >= min_open
        return replace(
            self,
            chances=self.chances[deep],
            codes=self.codes[deep],
            scores={name: scores[deep] for name, scores in self.scores.items()},
            n_open=self.n_open[deep],
        )

    def score(self, name: str, outputs: Outputs, chances: Floats, temperature: float) -> Floats:
        """A score of n cells, float32 [n].

        chances: float32 [n, C], the calibrated probabilities; temperature: T of "energy". Raises ConfigError for a name
        that is not in SCORES.
        """
        if name == "joint":
            found = self._corrected("energy", outputs, temperature)
            return (found + self._corrected("profile", outputs, temperature)).astype(np.float32)
        if name in DISTANCES:
            return self._corrected(name, outputs, temperature).astype(np.float32)
        return plain_score(name, outputs, chances, temperature)

    def _corrected(self, name: str, outputs: Outputs, temperature: float) -> NDArray[np.float64]:
        corrected = self.trends[name].corrected(self.raw(name, outputs, temperature), outputs.n_open)
        # A cell without open islands fits no profile, and is as usual.
        return np.where((outputs.n_open == 0) & np.isnan(corrected), 0.0, corrected)

    def raw(self, name: str, outputs: Outputs, temperature: float) -> NDArray[np.float64]:
        """One of TRENDED before the depth trend is taken off, float64 [n]; NaN where a cell fits no profile."""
        if name == "energy":
            return energy(outputs.logits, temperature)
        if name == "mahalanobis":
            return mahalanobis(outputs.embedding, self.means, self.whitening)
        if name == "knn":
            return knn(outputs.embedding, self.references, self.reference_codes)
        assert outputs.fit is not None, "asked for without fit"
        return -outputs.fit.astype(np.float64)


def plain_score(name: str, outputs: Outputs, chances: Floats, temperature: float) -> Floats:
    """A score that needs nothing of other cells, as ``KnownCells.score``; ModelError for one that does."""
    if checked_score(name) == "max_probability":
        return (1 - chances.max(axis=1)).astype(np.float32)
    if name == "energy":
        return energy(outputs.logits, temperature).astype(np.float32)
    raise ModelError(f"novelty score {name}: the model keeps no cells to measure to; finetune it again")


def energy(logits: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """-T logsumexp(logits / T) of n cells, float64 [n]; logits: [n, C]"""
    found: NDArray[np.float64] = -temperature * logsumexp(logits.astype(np.float64) / temperature, axis=1)
    return found


def mahalanobis(embedding: Floats, means: Floats, whitening: Floats) -> NDArray[np.float64]:
    """Distance of n cells to the nearest of C means, float64 [n]; arguments as in ``KnownCells``."""
    turned = whitening.astype(np.float64)
    distances = cdist(embedding.astype(np.float64) @ turned, means.astype(np.float64) @ turned)
    nearest: NDArray[np.float64] = distances.min(axis=1)
    return nearest


def knn(embedding: Floats, references: Floats, reference_codes: NDArray[np.integer]) -> NDArray[np.float64]:
    """Distance of n cells within which one in ONE_IN of R cells of some type lie; arguments as in ``KnownCells``."""
    nearest = np.full(len(embedding), np.inf)
    for code in np.unique(reference_codes):
        nearest = np.minimum(nearest, _squares(embedding, references[reference_codes == code]))
    return np.sqrt(np.maximum(nearest, 0))  # rounding may leave less than 0 of a cell that is stored


def _squares(embedding: Floats, of_type: Floats) -> NDArray[np.float64]:
    """Squared distance of n cells within which one in ONE_IN of the stored cells of a type lie, float64 [n]."""
    place = -(-len(of_type) // ONE_IN) - 1
    stored = of_type.astype(np.float64)
    found = np.empty(len(embedding))
    for start in range(0, len(embedding), _CHUNK):
        cells = embedding[start : start + _CHUNK].astype(np.float64)
        squares = (cells**2).sum(axis=1)[:, None] + (stored**2).sum(axis=1) - 2 * cells @ stored.T
        found[start : start + _CHUNK] = np.partition(squares, place, axis=1)[:, place]
    return found
