"""Memory that was freed, given back to the system."""

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Let the C library return the free pages of its heap, where it is glibc; elsewhere do nothing.

    Arrays of ever other lengths leave glibc's heap in pieces, so that a process grows from epoch to epoch though
    nothing is leaked; with this call it stays flat.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
