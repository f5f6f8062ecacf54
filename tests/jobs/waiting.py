"""Waiting for what other processes do."""

import time
from collections.abc import Callable

PATIENCE_S = 480.0


def wait_until(true: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Look again and again until it is so."""
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end, f"it took more than {patience_s:.0f} s until {what}"
        time.sleep(0.2)
