"""The string between a conversion and its tasks: stop, and how far the work is."""

import uuid

from annatac_scale.progress import Advance

_STOPPED: set[str] = set()
"""Runs that were stopped, as far as this process was told."""


class StoppedError(Exception):
    """Another sample failed, or the user stopped the conversion."""


class Hook:
    """Tells the tasks of a run to stop, and is told of their progress.

    A copy in another process tells nobody of the progress, and is stopped there.
    """

    def __init__(self, advance: Advance | None = None, run: str | None = None) -> None:
        self._advance = advance or Advance()
        self._run = run or uuid.uuid4().hex

    def __reduce__(self) -> tuple[type["Hook"], tuple[None, str]]:
        return Hook, (None, self._run)

    def stop(self) -> None:
        """Let every task in this process raise StoppedError when it next tells of its progress."""
        _STOPPED.add(self._run)

    def worked(self, sample: str, n_bytes: int, n_lines: int = 0) -> None:
        """Note work on a sample's file. Raises StoppedError when there is no point in going on."""
        if self._run in _STOPPED:
            raise StoppedError
        self._advance(n_bytes, n_lines, sample)

    def found(self, sample: str, n_bytes: int) -> None:
        """Note work that an earlier run did."""
        self._advance.found(n_bytes, sample)
