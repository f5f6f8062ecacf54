"""Memory that was freed: given back to the system, or kept for what comes next."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_ABOVE, _MMAP_ABOVE = 256 << 20, 32 << 20


def give_back_freed_memory() -> None:
    """Let the C library return the free pages of its heap, where it is glibc; elsewhere do nothing.

    Arrays of ever other lengths leave glibc's heap in pieces, so that a process grows from epoch to epoch though
    nothing is leaked; called every now and then it stays flat. It takes longer the more is given back.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next array, where it is glibc; for the whole process.

    Else arrays of some 100 kB and more are given back to the system one by one, and each page of the next one is asked
    for anew, which costs more than to write it.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_TRIM_THRESHOLD, _TRIM_ABOVE)
            mallopt(_M_MMAP_THRESHOLD, _MMAP_ABOVE)
