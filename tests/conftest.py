"""Settings of all tests: no deadlines (kernels compile on their first call), reproducible examples, one thread.

One thread, because bits are promised to be equal for an equal number of threads only, and tests compare processes; and
because pytest-xdist runs several tests side by side.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")
