import pytest
from known_stores import write_store


@pytest.fixture(scope="session")
def unequal_store(tmp_path_factory):
    """2,065 cells in samples of very unequal size, 11 blocks."""
    return write_store(tmp_path_factory.mktemp("stream") / "unequal.zarr", [700, 3, 260, 1, 1101])


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    """13 cells in two samples."""
    return write_store(tmp_path_factory.mktemp("stream") / "tiny.zarr", [9, 4], seed=1)
