"""The cache of blocks: whole entries or none, a bound that holds for all processes, whoever is killed when."""

import errno
import fcntl
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.errors import InputError
from annatac_scale.store import cache as caching
from annatac_scale.store.cache import BlockCache

END = 24  # bytes of an entry beside its data
KEYS = [f"{sample * 32}/{block}" for sample in ("ab", "cd") for block in range(20)]


def content(key: str) -> bytes:
    """What is put for a key, of a length of its own."""
    return random.Random(key).randbytes(200 + 37 * KEYS.index(key))


def room(folder: Path) -> int:
    """Bytes of all files but the lock's, also of half ones."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != ".lock")


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(tmp_path / "cache", 100_000)


def test_what_was_put_is_found(cache: BlockCache) -> None:
    other = pickle.loads(pickle.dumps(cache))
    assert cache.get("a/0") is None
    assert cache.put("a/0", b"zero")
    assert cache.put("a/1", b"")
    assert cache.put("a/0", b"zero")
    assert (other.get("a/0"), other.get("a/1"), other.get("b/0")) == (b"zero", b"", None)
    other.drop("a/0")
    other.drop("a/0")
    assert (cache.get("a/0"), cache.get("a/1")) == (None, b"")


@pytest.mark.parametrize("key", ["", "a", "a/../b", "/a/b", "a/b/c", "../a", "a/b\n", "a/" + 300 * "b"])
def test_keys_that_lead_elsewhere_are_refused(cache: BlockCache, key: str) -> None:
    for use in (cache.get, cache.drop, lambda key: cache.put(key, b"")):
        with pytest.raises(ValueError, match="no key"):
            use(key)


def test_the_bound_holds_and_nothing_is_thrown_out(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1000)
    assert cache.put("a/0", bytes(600 - END))
    assert not cache.put("a/1", bytes(401 - END))
    assert cache.put("a/2", bytes(400 - END))
    assert not cache.put("a/3", b"")
    assert room(tmp_path) == 1000
    assert cache.get("a/0") == bytes(600 - END)
    cache.drop("a/0")
    assert cache.put("a/1", bytes(600 - END))
    assert not BlockCache(tmp_path, 999).put("a/3", b"")
    assert BlockCache(tmp_path, 1000 + END).put("a/3", b"")


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "drop", "get"]), st.integers(0, 5), st.integers(0, 60)), max_size=30
)


@given(STEPS)
def test_a_cache_behaves_as_a_dictionary_with_a_bound(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache, model = BlockCache(folder, 250), dict[str, bytes]()
    for what, number, size in steps:
        key = f"a/{number}"
        if what == "put":
            fits = sum(len(data) + END for data in model.values()) + size + END <= 250
            assert cache.put(key, bytes([number]) * size) == (key in model or fits)
            if fits:
                model.setdefault(key, bytes([number]) * size)
        elif what == "drop":
            cache.drop(key)
            model.pop(key, None)
        assert {
            key: data for key in map("a/{}".format, range(6)) if (data := cache.get(key)) is not None
        } == model
    shutil.rmtree(folder)


# Damage


@pytest.mark.parametrize("kept", [0, 1, END - 1, END, 100, 100 + END - 1])
def test_a_truncated_entry_is_not_returned(cache: BlockCache, kept: int) -> None:
    cache.put("a/0", random.Random(0).randbytes(100))
    os.truncate(cache.folder / "a/0", kept)
    assert cache.get("a/0") is None
    assert not (cache.folder / "a/0").exists()
    assert cache.put("a/0", b"again")
    assert cache.get("a/0") == b"again"


@given(st.integers(0, 99 + END), st.integers(1, 255))
def test_a_damaged_entry_is_not_returned(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int
) -> None:
    cache = BlockCache(tmp_path_factory.mktemp("cache"), 1000)
    cache.put("a/0", random.Random(0).randbytes(100))
    damaged = bytearray((cache.folder / "a/0").read_bytes())
    damaged[at] ^= flip
    (cache.folder / "a/0").write_bytes(damaged)
    assert cache.get("a/0") is None
    shutil.rmtree(cache.folder)


def test_what_is_no_entry_of_its_key_is_not_returned(cache: BlockCache) -> None:
    cache.put("a/0", b"zero")
    for key, raw in [("a/1", (cache.folder / "a/0").read_bytes()), ("a/2", bytes(500)), ("a/3", b"")]:
        (cache.folder / key).write_bytes(raw)
        assert cache.get(key) is None
    assert cache.get("a/0") == b"zero"


@pytest.mark.parametrize("record", [b"", b"\xff" * 220, bytes(220), bytes(10)])
def test_a_lost_or_damaged_record_is_counted_anew(tmp_path: Path, record: bytes) -> None:
    cache = BlockCache(tmp_path, 1000)
    cache.put("a/0", bytes(600 - END))
    (tmp_path / ".lock").write_bytes(record)
    assert not cache.put("a/1", bytes(401 - END))
    assert cache.put("a/1", bytes(400 - END))


def test_what_others_removed_is_found_out_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BlockCache(tmp_path, 1000)
    cache.put("a/0", bytes(900))
    cache.put("b/0", b"")
    shutil.rmtree(tmp_path / "a")
    assert not cache.put("a/1", bytes(900))
    later = time.time() + 4000
    monkeypatch.setattr(caching.time, "time", lambda: later)
    assert cache.put("a/1", bytes(900))
    shutil.rmtree(tmp_path)
    assert cache.get("a/1") is None
    assert cache.put("a/1", bytes(900))


# Disks and folders


def test_a_full_disk_is_no_failure(cache: BlockCache) -> None:
    cache.put("a/0", b"zero")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        assert not cache.put("a/1", bytes(9999))
        assert sorted(os.listdir(cache.folder / "a")) == ["0"]
        assert room(cache.folder) == 4 + END
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cache.put("a/1", bytes(9999))


@pytest.mark.parametrize("call", ["makedirs", "open", "pwrite", "rename"])
def test_a_disk_that_is_full_at_any_step_is_no_failure(
    cache: BlockCache, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(caching.os, call, full)
        assert not cache.put("a/0", b"zero")
        cache.drop("a/0")
    assert cache.get("a/0") is None
    assert cache.put("a/0", b"zero")


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=rf"^{folder}: cannot be used as a cache .*choose another"):
            BlockCache(folder, 1000)
    cache = BlockCache(tmp_path / "cache", 1000)
    shutil.rmtree(cache.folder)
    cache.folder.write_bytes(b"mine")
    for use in (cache.get, lambda key: cache.put(key, b"")):
        with pytest.raises(InputError, match=rf"^{cache.folder}: cannot be used as a cache .*choose another"):
            use("a/0")
    with pytest.raises(InputError, match="bound of 0 bytes"):
        BlockCache(tmp_path / "cache", 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_of_another_user_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot be used as a cache .Permission denied"):
        BlockCache(tmp_path / "cache", 1000)


def test_a_lock_that_is_not_given_back_stops_nobody(cache: BlockCache) -> None:
    cache.put("a/0", b"zero")
    with open(cache.folder / ".lock", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not cache.put("a/1", b"one")
        assert cache.get("a/0") == b"zero"
    assert cache.put("a/1", b"one")


# Many at once


def fill(cache: BlockCache, seed: int, rounds: int) -> None:
    """Put, get and drop at random; what is found must be right."""
    rng = random.Random(seed)
    for _ in range(rounds):
        key = rng.choice(KEYS)
        if rng.random() < 0.05:
            cache.drop(key)
        elif rng.random() < 0.5:
            cache.put(key, content(key))
        assert cache.get(key) in (None, content(key))


def started(method: str, target: Callable[..., None], *arguments: Any) -> Any:
    process = multiprocessing.get_context(method).Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def check(cache: BlockCache) -> None:
    """The bound holds, the record is right, and all room can still be used."""
    assert room(cache.folder) <= cache.max_bytes
    present = {key: data for key in KEYS if (data := cache.get(key)) is not None}
    assert all(data == content(key) for key, data in present.items())
    used = sum(len(data) + END for data in present.values())
    spare = cache.max_bytes - used - END
    if spare < 0:  # not even the end of an entry fits
        assert not cache.put("x/0", b"")
        return
    assert not cache.put("x/0", bytes(spare + 1))
    assert cache.put("x/0", bytes(spare))
    assert room(cache.folder) == cache.max_bytes
    cache.drop("x/0")


def test_threads_share_a_folder(cache: BlockCache) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda seed: fill(cache, seed, 100), range(8)))
    check(BlockCache(cache.folder, cache.max_bytes))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_folder(tmp_path: Path, method: str) -> None:
    cache = BlockCache(tmp_path / "cache", sum(len(content(key)) for key in KEYS) // 2)
    processes = [started(method, fill, cache, seed, 200) for seed in range(4)]
    while any(process.is_alive() for process in processes):
        with cache._locked() as record:
            assert record is None or room(cache.folder) <= cache.max_bytes
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0] * 4
    check(cache)


def test_killed_writers_leave_the_bound_and_whole_entries(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", sum(len(content(key)) for key in KEYS) // 2)
    rng = random.Random(0)
    for turn in range(12):
        processes = [started("fork", fill, cache, 100 * turn + seed, 10**6) for seed in range(3)]
        time.sleep(rng.uniform(0.02, 0.15))
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join(30)
            assert process.exitcode == -signal.SIGKILL
        check(cache)


def put_and_die(cache: BlockCache, call: str, nth: int) -> None:
    """Die at the ``nth`` call of a function of os within a put and a drop; "after" it where it says so."""
    when, _, name = call.partition(" ")
    left, real = [nth], getattr(os, name)

    def dying(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if when == "before" and not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        done = real(*arguments, **named)
        if when == "after" and not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(os, name, dying)
    cache.put("a/1", bytes(300))
    cache.drop("a/0")


@pytest.mark.parametrize(
    ("call", "nth"),
    [
        *[
            (f"{when} {name}", nth)
            for when in ("before", "after")
            for name, nth in [("pwrite", 1), ("pwrite", 2)]
        ],
        *[(f"{when} {name}", 1) for when in ("before", "after") for name in ("rename", "unlink")],
    ],
)
def test_a_writer_that_is_killed_at_any_step_leaves_the_record_right(
    tmp_path: Path, call: str, nth: int
) -> None:
    cache = BlockCache(tmp_path / "cache", 2000)
    cache.put("a/0", bytes(500))
    process = started("fork", put_and_die, cache, call, nth)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert room(cache.folder) <= 2000
    used = sum(524 if key == "a/0" else 324 for key in ("a/0", "a/1") if cache.get(key) is not None)
    assert not cache.put("x/0", bytes(2000 - used - END + 1))
    assert cache.put("x/0", bytes(2000 - used - END))


def put_when_free(cache: BlockCache, key: str) -> None:
    while not cache.put(key, content(key)):
        time.sleep(0.01)


def test_a_process_that_is_forked_while_an_entry_is_written_may_write(cache: BlockCache) -> None:
    with cache._locked() as record:
        assert record is not None
        child = started("fork", put_when_free, cache, KEYS[0])
    child.join(30)
    child.kill()
    assert cache.get(KEYS[0]) == content(KEYS[0])


def test_a_lock_does_not_live_on_in_forked_processes(cache: BlockCache) -> None:
    with cache._locked() as record:
        assert record is not None
        child = started("fork", time.sleep, 60)
        os.dup2(os.open(os.devnull, os.O_RDONLY), record)  # closed without being unlocked, as by a kill
    try:
        assert cache.put("a/0", b"zero")
    finally:
        child.kill()
        child.join(30)
