"""Counts of many keys in little memory: (key, count) pairs, sorted, instead of one entry a count."""

import numpy as np
from numpy.typing import NDArray


class Tally:
    """Adds up how often each key (int64) came. Memory follows the distinct keys, not the counts."""

    def __init__(self) -> None:
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._n_waiting = 0

    def add(self, keys: NDArray[np.int64]) -> None:
        """Count each key of ``keys`` (any order, repeats allowed) once more; the array may be reused after."""
        run = np.unique(keys, return_counts=True)
        self._waiting.append(run)
        self._n_waiting += len(run[0])
        # Merging only when as much waits as is merged keeps the work at n log n.
        if self._n_waiting > len(self._keys):
            self._merge()

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The distinct keys, increasing, and the count of each."""
        self._merge()
        return self._keys, self._counts

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(run[0] for run in self._waiting)])
        counts = np.concatenate([self._counts, *(run[1] for run in self._waiting)])
        self._waiting, self._n_waiting = [], 0
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        first = np.flatnonzero(np.concatenate([np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1]]))
        self._keys = keys[first]
        self._counts = np.add.reduceat(counts, first) if len(first) else counts
