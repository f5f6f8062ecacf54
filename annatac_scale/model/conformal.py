"""Split-conformal figures: ranks, prediction sets, p-values. They hold for cells exchangeable with the calib cells.

A prediction set holds the types whose probability is at least a threshold. The score of a cell is 1 less the
probability of its true type ("LAC", Sadinle et al., JASA 2019): of all rules with the same coverage it gives the
smallest sets on average, and it draws no random numbers, so that a cell has the same set in every run. APS (Romano et
al., NeurIPS 2020) evens out coverage between easy and hard cells, but is exact only with a random number for each
cell, and its sets are larger. Probabilities are compared as they are stored, float32, so that a calib cell which is
scored again is a tie and not a rounding apart; ties count as inside, which can only raise the coverage.

An empty set says that no type is likely enough: among cells like the calib cells that happens to some of the share
1 - coverage that is missed anyway. A set of all types says that the cell could be any of them, or that there are too
few calib cells to leave any out.
"""

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import ConfigError

DEFAULT_COVERAGE = 0.9
"""Share of the cells whose set holds the true type, where nothing else is asked for."""

Floats = NDArray[np.float32]
Scores = NDArray[np.floating]


def rank_of(n: int, share: float) -> int:
    """Which of ``n`` calib scores, in increasing order from 1, is the limit: ceil((n + 1) x share), exactly.

    A new score is at most that one with a probability of at least ``share``. Above n there is no limit: n + 1.
    ``share`` is the decimal number that it prints as, so that 0.9 of 10 is 9. Raises ConfigError unless 0 < share < 1.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share of cells: found {share}; expected a number above 0 and below 1, as 0.9")
    return min(math.ceil((n + 1) * Fraction(str(float(share)))), n + 1)


def fewest_calib(rate: float) -> int:
    """Calib cells that it takes to tell a share ``rate`` of them apart: the least n with n >= 1 / rate - 1."""
    return math.ceil(1 / Fraction(str(float(rate)))) - 1


def fewest_covering(coverage: float) -> int:
    """Calib cells that it takes to leave a type out of a set: the least n with n >= 1 / (1 - coverage) - 1."""
    return math.ceil(1 / (1 - Fraction(str(float(coverage))))) - 1


def set_thresholds(
    chances: Floats, codes: NDArray[np.integer], n_types: int, coverage: float, *, per_class: bool
) -> Floats:
    """Probability from which a type belongs to the set, float32 [n_types].

    chances: float32 [n], of the true type of each calib cell; codes: [n], those types
    per_class: each type has a threshold of its own, so that ``coverage`` holds among the cells of each type, the rare
        ones too. A type with fewer than 1 / (1 - coverage) - 1 calib cells takes the marginal threshold.

    The threshold is 0, which lets every type in, where the calib cells are too few even together. Raises ConfigError
    unless 0 < coverage < 1.
    """
    marginal = _lowest(chances, coverage)
    thresholds = np.full(n_types, 0 if marginal is None else marginal, np.float32)
    for code in range(n_types if per_class else 0):
        own = _lowest(chances[codes == code], coverage)
        thresholds[code] = thresholds[code] if own is None else own
    return thresholds


def _lowest(chances: Floats, coverage: float) -> np.float32 | None:
    """The lowest probability that is still inside; None where the cells are too few to tell."""
    rank = rank_of(len(chances), coverage)
    lowest: np.float32 | None = None if rank > len(chances) else np.sort(chances)[len(chances) - rank]
    return lowest


def p_values(scores: Scores, calib: Scores) -> NDArray[np.float64]:
    """(1 + calib scores that are at least as large) / (n + 1), float64 [m]: small where a score is unusually large.

    scores: [m]; calib: increasing [n]. Among cells exchangeable with the calib cells, a p-value of at most a occurs
    with a probability of at most a.
    """
    as_large = len(calib) - np.searchsorted(calib, scores, side="left")
    return (1 + as_large) / (len(calib) + 1)


def exceeds(scores: Scores, calib: Scores, rate: float) -> NDArray[np.bool_]:
    """Whether a score is above the calib score of ``rank_of`` 1 - ``rate``, bool [m]: its p-value is at most ``rate``.

    calib: increasing [n]. No score is where n < 1 / rate - 1. Raises ConfigError unless 0 < rate < 1.
    """
    rank_of(len(calib), rate)
    # n + 1 less ceil((n + 1) (1 - rate)) is this, with no 1 - rate that would round.
    n_above = math.floor((len(calib) + 1) * Fraction(str(float(rate)))) - 1
    if n_above < 0:
        return np.zeros(len(scores), np.bool_)
    above: NDArray[np.bool_] = scores > calib[len(calib) - 1 - n_above]
    return above
