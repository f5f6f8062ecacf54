"""Profiles: which islands are open in the known cells of each type, and how well a cell's open islands fit one.

A profile gives each island its share of all open islands of a type's training cells. A cell fits it by the mean log
share of its open islands: the log-likelihood of an open island under the multinomial model of naive Bayes (McCallum and
Nigam, AAAI workshop 1998). The classes' differences are what a classifier looks at; the fit also sees what no known
type has, as islands that are seldom open in all of them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from annatac_scale.model.island_sums import sum_over_islands
from annatac_scale.store.open_islands import OpenIslands

LENT = 200.0
"""Open islands that each profile is lent from those of all types: what it says of islands that it has hardly seen."""
UNSEEN = 0.5
"""Times that each island counts as open in some cell, so that none has no share."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Profiles:
    """log_shares: float32 [N, C], natural logarithm of the share that each island has in the profile of each type"""

    log_shares: Floats

    @classmethod
    def of(cls, counts: NDArray[np.integer]) -> "Profiles":
        """The profiles of cells. counts: [N, C], training cells of each type in which each island is open."""
        everywhere = counts.sum(axis=1) + UNSEEN
        lent = LENT * everywhere / everywhere.sum()
        shares = counts.astype(np.float32)  # one copy: there may be 600,000 islands and 50 types
        shares += lent.astype(np.float32)[:, None]
        shares /= shares.sum(axis=0, dtype=np.float64).astype(np.float32)
        return cls(np.log(shares, out=shares))

    def fit(self, cells: OpenIslands) -> Floats:
        """How well n cells fit the profile that they fit best, float32 [n]; NaN for a cell without open islands."""
        sums = sum_over_islands(torch.from_numpy(self.log_shares), cells).numpy()
        with np.errstate(invalid="ignore"):
            fits: Floats = (sums.max(axis=1) / cells.n_open).astype(np.float32)
        return fits
