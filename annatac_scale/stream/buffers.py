"""Memory that is used again and again, so that a process does not grow from epoch to epoch."""

from bisect import bisect_left, insort
from threading import Lock

import numpy as np
from numpy.typing import NDArray

Buffer = NDArray[np.uint8]


class BufferPool:
    """Buffers of like sizes. Each epoch has threads of its own, and the C library keeps what each of them freed apart.

    A pickled pool comes back empty. Used by any number of threads.
    """

    def __init__(self) -> None:
        self._free: list[Buffer] = []
        self._lock = Lock()

    def take(self, size: int) -> Buffer:
        """A buffer of ``size`` bytes or somewhat more, not zeroed."""
        with self._lock:
            place = bisect_left(self._free, size, key=len)
            if place < len(self._free):
                return self._free.pop(place)
            if self._free:
                del self._free[0]  # sizes grow: what became too small goes
        return np.empty(size + size // 32, np.uint8)

    def give_back(self, buffer: Buffer) -> None:
        """Let a buffer be taken again; nobody may use it any more."""
        with self._lock:
            insort(self._free, buffer, key=len)

    def __reduce__(self) -> tuple[type["BufferPool"], tuple[()]]:
        return BufferPool, ()
