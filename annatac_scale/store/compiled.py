"""How kernels are compiled: to machine code that holds no lock and counts no references."""

from numba import njit

compiled = njit(nogil=True, cache=True, _nrt=False)
"""For functions that allocate nothing. numba counts references to each array that a function is given or takes out of a
tuple, atomically: that took two thirds of the time of counting fragments, and threads wait for each other in it."""
