"""How kernels are compiled: to machine code that holds no lock and counts no references."""

from typing import Any

from numba import njit

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "_nrt": False}

compiled = njit(**_OPTIONS)
"""For functions that allocate nothing. numba counts references to each array that a function is given or takes out of a
tuple, atomically: that took two thirds of the time of counting fragments, and threads wait for each other in it."""

inlined = njit(forceinline=True, **_OPTIONS)
"""For parts of such a function: a tuple of arrays would be copied, number by number, at each call."""
