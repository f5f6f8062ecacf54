"""Quantiles of any number of values in the memory of a few thousand bins."""

import numpy as np
from numpy.typing import NDArray

_SHARE_BINS = 2000
_EXACT_UP_TO = 1024
_STEP = 1.01
_MOST = 2**31


class Histogram:
    """Counts of values in fixed bins, which say quantiles as closely as the bins are narrow."""

    def __init__(self, edges: NDArray[np.float64], stands_for: NDArray[np.float64]) -> None:
        """edges: float64 [b + 1], increasing; stands_for: float64 [b], the value that is said for each bin.

        A value lies in the bin whose lower edge is the last that is no larger; what lies beyond counts at the ends.
        """
        self._edges, self._stands_for = edges, stands_for
        self._counts = np.zeros(len(stands_for), np.int64)
        self._ends = np.inf, -np.inf

    @classmethod
    def of_shares(cls) -> "Histogram":
        """For values from 0 to 1: quantiles are at most 0.00025 off."""
        edges = np.linspace(0, 1, _SHARE_BINS + 1)
        return cls(edges, (edges[:-1] + edges[1:]) / 2)

    @classmethod
    def of_counts(cls) -> "Histogram":
        """For whole numbers from 0 to 2**31: quantiles up to 1,024 are exact, above at most 0.5% off."""
        above = _EXACT_UP_TO * _STEP ** np.arange(1 + np.log(_MOST / _EXACT_UP_TO) / np.log(_STEP))
        edges = np.unique(np.concatenate([np.arange(_EXACT_UP_TO), above.round()]))
        return cls(edges, np.floor((edges[:-1] + edges[1:] - 1) / 2))

    def add(self, values: NDArray[np.integer] | NDArray[np.floating]) -> None:
        """Add values, none of them NaN."""
        if not len(values):
            return
        bins = np.searchsorted(self._edges, values, "right") - 1
        self._counts += np.bincount(np.clip(bins, 0, len(self._counts) - 1), minlength=len(self._counts))
        self._ends = min(self._ends[0], float(values.min())), max(self._ends[1], float(values.max()))

    def __len__(self) -> int:
        return int(self._counts.sum())

    def quantile(self, share: float) -> float | None:
        """The smallest value that at least so large a share of the values do not exceed; None without values."""
        n = len(self)
        if not n:
            return None
        rank = max(int(np.ceil(share * n)), 1)
        place = int(np.searchsorted(np.cumsum(self._counts), rank))
        return float(np.clip(self._stands_for[place], *self._ends))
