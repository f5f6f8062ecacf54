"""Counts of many keys in little memory: (key, count) pairs, sorted, instead of one entry a count."""

import numpy as np
from numpy.typing import NDArray

from annatac_scale.store.compiled import compiled


class Tally:
    """Adds up how often each key (int64) came. Memory follows the distinct keys, not the counts."""

    def __init__(self) -> None:
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._n_waiting = 0

    def add(self, keys: NDArray[np.int64]) -> None:
        """Count each key of ``keys`` (any order, repeats allowed) once more; the array is sorted, and may be reused."""
        keys.sort()
        run = _summed(keys, np.ones(len(keys), np.int64))
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
        runs = [run for run in [(self._keys, self._counts), *self._waiting] if len(run[0])]
        self._waiting, self._n_waiting = [], 0
        if len(runs) == 1:
            self._keys, self._counts = runs[0]
        elif runs:
            keys = np.concatenate([run[0] for run in runs])
            counts = np.concatenate([run[1] for run in runs])
            order = np.argsort(keys, kind="stable")
            self._keys, self._counts = _summed(keys[order], counts[order])


def _summed(
    keys: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct keys of sorted ones, and the sums of their counts."""
    distinct, sums = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64)
    n = _sum_runs(keys, counts, distinct, sums)
    return distinct[:n].copy(), sums[:n].copy()


@compiled
def _sum_runs(keys, counts, distinct, sums):  # type: ignore[no-untyped-def]
    n = 0
    for i in range(len(keys)):
        if n > 0 and distinct[n - 1] == keys[i]:
            sums[n - 1] += counts[i]
        else:
            distinct[n], sums[n] = keys[i], counts[i]
            n += 1
    return n
