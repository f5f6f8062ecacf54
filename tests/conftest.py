"""Settings of all tests: no deadlines (kernels compile on their first call), reproducible examples, one thread.

One thread, because bits are promised to be equal for an equal number of threads only, and tests compare processes; and
because pytest-xdist runs several tests side by side.
"""

import gc
import multiprocessing
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from object_storage import ObjectStorage

# Processes that tests start by forkserver come from one that has imported these; the last is found from the root of the
# project, and left out elsewhere.
multiprocessing.set_forkserver_preload(
    ["pytest", "annatac_scale.train.pretrain", "annatac_scale.annotate.predict", "benchmarks.warm_kernels"]
)

settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end of a run no process has to wait for one of them in another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """No test leaves torch more threads: the bits of those that follow would be others."""
    yield
    torch = sys.modules.get("torch")  # seconds to import, for tests that have no need of it
    if torch is not None:
        left = torch.get_num_threads()
        torch.set_num_threads(1)
        assert left == 1


@pytest.fixture(scope="session")
def _object_storage() -> "Iterator[ObjectStorage]":
    from object_storage import running  # a second that most tests need not wait for

    with running() as storage:
        yield storage


@pytest.fixture
def s3(_object_storage: "ObjectStorage", monkeypatch: pytest.MonkeyPatch) -> "Iterator[ObjectStorage]":
    """A real S3 server over HTTP that the environment names; ``s3.bucket()`` makes a bucket."""
    for name, value in _object_storage.environment.items():
        monkeypatch.setenv(name, value)
    # The server's threads are this process's. A garbage collection in one of them that meets an HDF5 object waits for
    # the lock of whoever reads HDF5 from the server, who waits for the server.
    gc.disable()
    yield _object_storage
    gc.enable()
