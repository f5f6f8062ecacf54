"""The string between a conversion and its tasks in the same process: stop, and how far the work is."""

import threading

from annatac_scale.progress import Advance


class StoppedError(Exception):
    """Another sample failed, or the user stopped the conversion."""


class Hook:
    """Tells tasks to stop, and is told of their progress. In another process it is tied to nothing."""

    def __init__(self, advance: Advance | None = None) -> None:
        self._advance = advance or Advance()
        self._stopping = threading.Event()
        self.is_local = advance is not None

    def __reduce__(self) -> tuple[type["Hook"], tuple[()]]:
        return Hook, ()

    def stop(self) -> None:
        """Let every task raise StoppedError when it next tells of its progress."""
        self._stopping.set()

    def worked(self, sample: str, n_bytes: int, n_lines: int = 0) -> None:
        """Note work on a sample's file. Raises StoppedError when there is no point in going on."""
        if self._stopping.is_set():
            raise StoppedError
        self._advance(n_bytes, n_lines, sample)

    def found(self, sample: str, n_bytes: int) -> None:
        """Note work that an earlier run did."""
        self._advance.found(n_bytes, sample)
