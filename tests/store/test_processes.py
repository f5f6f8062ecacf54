"""A store opened in one process is read in others, however they were started, on a disk and in object storage."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_storage import ObjectStorage
from random_stores import SPACE, random_cells, write_sample

from annatac_scale.errors import StoreError
from annatac_scale.store import clients
from annatac_scale.store.place import Location, place_of
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import create_store

METHODS = ("fork", "spawn", "forkserver")
N_CELLS = 600


@pytest.fixture(params=["disk", "object storage"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A store with one sample."""
    disk = request.param == "disk"
    location = tmp_path / "atlas.zarr" if disk else f"{request.getfixturevalue('s3').bucket()}/atlas.zarr"
    create_store(location, SPACE, "insertion")
    write_sample(location, "s", random_cells(N_CELLS, 1))
    return location


def run(method: str, target: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in another process; an exception of it is raised here."""
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(False)
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    process = context.Process(target=_answer, args=(there, variables, target, *arguments))
    process.start()
    there.close()
    try:
        assert here.poll(60), "the process hangs"
        done = here.recv()
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
    if isinstance(done, Exception):
        raise done
    return done


def _answer(connection: Any, variables: dict[str, str], target: Callable[..., Any], *arguments: Any) -> None:
    os.environ.update(variables)  # the server of forkserver was started by an earlier test
    try:
        connection.send(target(*arguments))
    except Exception as error:
        connection.send(error)


def read_all(store: IslandStore) -> list[Any]:
    """All of a store that may be cached, or read by another way."""
    cells, sample = store.read(np.arange(store.n_cells)), store.samples["s"]
    return [
        cells.offsets.tolist(),
        cells.islands.tolist(),
        sample.obs().to_csv(),
        sample.measured.tolist(),
        store.space.sha256,
    ]


def read_in_a_grandchild(store: IslandStore, depth: int) -> list[Any]:
    found = read_all(store)
    return run("fork", read_in_a_grandchild, store, depth - 1) if depth else found


@pytest.mark.parametrize("method", METHODS)
def test_a_store_that_was_read_here_is_read_in_another_process(location: Location, method: str) -> None:
    store = IslandStore.open(location)
    expected = read_all(store)
    assert run(method, read_all, store) == expected
    assert run(method, read_all, IslandStore.open(location)) == expected
    assert read_all(pickle.loads(pickle.dumps(store))) == expected
    assert read_all(IslandStore.open(location)) == expected


def test_processes_are_forked_while_threads_read(location: Location) -> None:
    store = IslandStore.open(location)
    expected = read_all(store)
    stop: list[bool] = []

    def read_on(_: int) -> int:
        n = 0
        while not stop:
            store.read(np.arange(0, N_CELLS, 50))
            n += 1
        return n

    with ThreadPoolExecutor(8) as threads:
        reading = [threads.submit(read_on, i) for i in range(8)]
        try:
            for _ in range(5):
                assert run("fork", read_all, store) == expected
        finally:
            stop.append(True)
        assert all(done.result(60) > 0 for done in reading)


def test_forked_processes_fork_again(location: Location) -> None:
    store = IslandStore.open(location)
    assert run("fork", read_in_a_grandchild, store, 2) == read_all(store)


def write_and_list(location: Location) -> list[str]:
    place = place_of(location)
    place.write("written/here", b"1")
    place.write_all({"written/too": b"2"}, {"written/copy": "written/here"})
    place.remove("written/too")
    return place.names("written")


def test_a_forked_process_writes_too(location: Location) -> None:
    assert run("fork", write_and_list, location) == ["written/copy", "written/here"]
    assert place_of(location).read("written/copy") == b"1"


def read_without_a_copy(store: IslandStore) -> list[Any]:
    def refused(_: str) -> int:
        raise PermissionError(1, "Operation not permitted")

    os.memfd_create = refused
    return read_all(store)


@pytest.mark.parametrize("location", ["object storage"], indirect=True)
def test_a_forked_process_that_cannot_read_is_told_how_to_start_another(location: Location) -> None:
    store = IslandStore.open(location)
    with pytest.raises(StoreError, match=r"in this forked process .*not permitted.*forkserver.*DataLoader"):
        run("fork", read_without_a_copy, store)
    assert read_all(store)


FORK_AFTER_OTHERS = """
import os, signal, obstore
from obstore.store import from_url
from annatac_scale.store.place import place_of
storage = from_url({bucket!r}, client_options={{"allow_http": True}})
assert obstore.get(storage, "file").bytes() == b"1"

def read_and_fork(depth):
    child = os.fork()
    if not child:
        signal.alarm(30)
        wrong = place_of({bucket!r}).read("file") != b"1"
        if depth:
            read_and_fork(depth - 1)
        os._exit(wrong)
    assert os.waitpid(child, 0)[1] == 0

read_and_fork(2)
"""


def test_processes_are_forked_after_other_code_had_used_obstore(s3: ObjectStorage) -> None:
    bucket = s3.bucket()
    s3.put(f"{bucket}/file", b"1")
    script = FORK_AFTER_OTHERS.format(bucket=bucket)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_each_fork_has_a_path_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []
    monkeypatch.setattr(clients, "_load", paths.append)
    for forks in (1, 2, 3):
        clients._own_copy(forks)
    assert (
        len(set(paths)) == 3
    )  # whichever number the file has: a library that is loaded already is found by it
    assert all(path.startswith("/proc/self/") for path in paths)
