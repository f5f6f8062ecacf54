"""Which cells of a part share a batch: a rule that looks at the part's cells alone."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

BATCH_TOKENS = 16_384
"""Most tokens of a batch of several cells: about 200 MB at the size of the paper's encoder."""

BATCH_CELLS = 256
"""Most cells of a batch: each has some tensors of its own, however few its tokens."""

SUMMED_BATCH_TOKENS = 131_072
"""As BATCH_TOKENS, for heads that are sums over islands: nothing but what is decoded is as long as the tokens."""


def cut_batches(n_tokens: NDArray[np.int64], most_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Cut cells into batches: positions int64 [B], every cell once.

    n_tokens: int64 [n]. Cells of like length come together, in order of their tokens; a batch has BATCH_CELLS cells
    and ``most_tokens`` tokens at most, or one cell.
    """
    order = np.argsort(n_tokens, kind="stable")
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(n_tokens[order])])
    start = 0
    while start < len(order):
        within = int(np.searchsorted(before, before[start] + most_tokens, side="right")) - 1
        stop = max(start + 1, min(within, start + BATCH_CELLS))
        yield order[start:stop]
        start = stop


def evenly_spaced(cells: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """All of some cells, or ``most`` of them, evenly spaced; int64."""
    n = min(most, len(cells))
    return cells[np.arange(n) * len(cells) // max(n, 1)]
