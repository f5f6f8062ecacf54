"""Settings of all tests: no deadlines (kernels compile on their first call) and reproducible examples."""

from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")
