"""An object storage that fails: what passes is waited for, what stays is told, and half is never taken for whole."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from faulty_server import FAULTS, FaultyServer, serving
from object_storage import ObjectStorage

from annatac_scale.errors import StoreError
from annatac_scale.store import clients, objects
from annatac_scale.store.place import Place, blob_of, place_of

DATA = random.Random(0).randbytes(400_000)
RETRIES: dict[str, Any] = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {
        "init_backoff": timedelta(milliseconds=5),
        "max_backoff": timedelta(milliseconds=50),
        "base": 2,
    },
}


@pytest.fixture
def server(s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    with serving(DATA) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setattr(clients, "RETRIES", RETRIES)
        monkeypatch.setattr(clients, "STALLED", timedelta(seconds=0.3))
        monkeypatch.setattr(objects, "_TORN_S", (0.01, 0.01, 0.01))
        yield server


@pytest.fixture
def place(server: FaultyServer) -> Place:
    return place_of("s3://bucket/a")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_for_a_while_is_asked_again(server: FaultyServer, place: Place, fault: str) -> None:
    server.fault, server.left = fault, 2
    assert place.read_range("file", 1000, 300_000) == DATA[1000:301_000]
    assert (server.left, server.requests) == (0, 3)
    if fault not in ("less than it says", "less, and says so"):  # of a whole object, this is the size itself
        server.left = 2
        assert place.read("file") == DATA
    blob = blob_of("s3://bucket/file")
    server.left = 2
    assert blob.read(5, 1000) == DATA[5:1005]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_on_failing_is_told_and_never_taken_for_whole(
    server: FaultyServer, place: Place, fault: str
) -> None:
    server.fault, server.left = fault, 10**9
    with pytest.raises(StoreError, match=r"^s3://bucket/a/b/file: cannot be read .*; expected .* again$"):
        place.read_range("b/file", 1000, 300_000)
    assert server.requests == 4


def test_sixty_four_ranges_are_in_flight_at_once(server: FaultyServer, place: Place) -> None:
    server.fault, server.left = "closed in the body", 20
    with ThreadPoolExecutor(64) as threads:
        ranges = [(start, 5000) for start in range(0, 395_000, 1000)]
        parts = list(threads.map(lambda both: place.read_range("file", *both), ranges))
    assert parts == [DATA[start : start + length] for start, length in ranges]
    assert server.left == 0
