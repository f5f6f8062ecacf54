"""Stores are created and samples committed whole or not at all, whoever else writes or is killed."""

import contextlib
import fcntl
import json
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_stores import MEASURED, SPACE, barcodes, random_cells, random_obs, write_sample
from scipy import sparse

from annatac_scale.errors import InputError, StoreError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store.locks import store_lock
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, committed_samples, create_store, replace_obs

# Creating


def test_other_islands_or_counting_or_folders_are_refused(path: Path, tmp_path: Path) -> None:
    write_sample(path, "s", random_cells(3, 1))
    create_store(path, SPACE, "insertion")
    with pytest.raises(StoreError, match="counting 'insertion', but 'fragment'"):
        create_store(path, SPACE, "fragment")
    other = IslandSpace.all(Assembly("toy", ("chr1",), (3_000_000,)))
    with pytest.raises(StoreError, match="islands_sha256"):
        create_store(path, other, "insertion")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for place in (tmp_path / "full", tmp_path / "full" / "thesis.txt"):
        with pytest.raises(StoreError, match="not an island store"):
            create_store(place, SPACE, "insertion")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    with pytest.raises(StoreError, match="annatac convert"):
        IslandStore.open(tmp_path / "nowhere")


def test_an_empty_folder_becomes_a_store_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "atlas.zarr").mkdir()
    create_store(tmp_path / "atlas.zarr", SPACE, "insertion")
    assert IslandStore.open(tmp_path / "atlas.zarr").n_cells == 0
    assert [file.name for file in tmp_path.iterdir()] == ["atlas.zarr"]


def test_a_store_without_samples_gives_way_to_one_of_other_islands(path: Path) -> None:
    create_store(path, SPACE, "fragment")
    assert IslandStore.open(path).counting == "fragment"
    assert [file.name for file in path.parent.iterdir()] == ["atlas.zarr"]


def test_a_store_that_is_being_written_does_not_give_way(path: Path) -> None:
    with SampleWriter(path, "s", 3), pytest.raises(StoreError, match="counting 'insertion', but 'fragment'"):
        create_store(path, SPACE, "fragment")


def together(n: int, work: Callable[[int], Any]) -> list[Any]:
    """Results of n threads that begin at the same moment."""
    barrier = threading.Barrier(n)

    def begin(i: int) -> Any:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(n) as threads:
        return [future.result() for future in [threads.submit(begin, i) for i in range(n)]]


@pytest.mark.parametrize("before", ["nothing", "empty folder", "other store"])
def test_a_store_can_be_created_by_several_at_once(tmp_path: Path, before: str) -> None:
    for turn in range(4):
        path = tmp_path / f"{turn}.zarr"
        if before == "empty folder":
            path.mkdir()
        elif before == "other store":
            create_store(path, SPACE, "fragment")
        together(4, lambda _, path=path: create_store(path, SPACE, "insertion"))
        assert IslandStore.open(path).counting == "insertion"
        assert IslandStore.open(path).space.sha256 == SPACE.sha256
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{turn}.zarr" for turn in range(4)]


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: create_store(path, SPACE, "insertion"), id="create"),
        pytest.param(lambda path: write_sample(path, "t", random_cells(3, 1)), id="add a sample"),
        pytest.param(lambda path: replace_obs(path, "s", random_obs(3, 1)), id="replace obs"),
    ],
)
def test_nothing_is_written_into_a_store_of_another_major_version(
    path: Path, write: Callable[[Path], Any]
) -> None:
    write_sample(path, "s", random_cells(3, 1))
    root = path / "zarr.json"
    root.write_text(root.read_text().replace('"version": "2.0"', '"version": "3.0"'))
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    with pytest.raises(StoreError, match=r"store format 3\.0"):
        write(path)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


# Names


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "-x", "a b", "a\n", "zarr.json"])
def test_sample_names_that_could_leave_the_store_or_meet_its_files_are_refused(path: Path, name: str) -> None:
    with pytest.raises(InputError, match="sample name"), SampleWriter(path, name, 1):
        pass


NAMES = ["a", "a.lock", "a.obs", "b.obs", "zarr.json.partial", "obs"]


def test_samples_of_any_names_can_be_written_together_while_others_read(path: Path) -> None:
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(SampleWriter(path, name, 3)) for name in NAMES]
        assert IslandStore.open(path).n_cells == 0
        for n_committed, writer in enumerate(writers):
            writer.write_shard(0, OpenIslands.from_csr(random_cells(3, n_committed)))
            writer.commit(random_obs(3, n_committed), MEASURED, {})
            replace_obs(path, writer.name, random_obs(3, 7))
            assert list(IslandStore.open(path).samples) == NAMES[: n_committed + 1]
    store = IslandStore.open(path)
    for i, sample in enumerate(store.samples.values()):
        assert (sample.read_block(0).to_csr(len(SPACE)) != random_cells(3, i)).nnz == 0
        assert list(sample.obs()["score"]) == list(random_obs(3, 7)["score"])
    assert not (path / ".incoming").exists()


# Commits


def test_a_sample_left_without_commit_is_invisible_and_can_be_written_again(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), SampleWriter(path, "s", 5) as writer:  # noqa: PT012
        writer.write_shard(0, OpenIslands.empty(5))
        raise KeyboardInterrupt
    assert committed_samples(path) == []
    assert not (path / ".incoming").exists()
    write_sample(path, "s", random_cells(5, 1))
    assert committed_samples(path) == ["s"]


def _write_and_hang(path: Path, started: multiprocessing.synchronize.Event) -> None:
    with SampleWriter(path, "s", 4100) as writer:
        writer.write_shard(0, OpenIslands.from_csr(random_cells(4000, 1)))
        started.set()
        signal.pause()


def test_a_writer_killed_in_the_middle_leaves_nothing_visible_and_no_lock(path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    started = context.Event()
    process = context.Process(target=_write_and_hang, args=(path, started))
    process.start()
    assert started.wait(60)
    with pytest.raises(StoreError, match="another process is writing sample 's'"), SampleWriter(path, "s", 1):
        pass
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert IslandStore.open(path).n_cells == 0
    digest = write_sample(path, "s", random_cells(4100, 1))
    assert IslandStore.open(path).samples["s"].digest == digest


def test_a_sample_renamed_but_not_indexed_is_not_committed(path: Path) -> None:
    write_sample(path, "s", random_cells(5, 1))
    index = path / "samples/zarr.json"
    metadata = json.loads(index.read_text())
    metadata["attributes"]["index"] = []
    index.write_text(json.dumps(metadata))
    assert IslandStore.open(path).n_cells == 0
    write_sample(path, "s", random_cells(7, 2))
    assert IslandStore.open(path).n_cells == 7


def test_a_sample_is_never_written_twice(path: Path) -> None:
    write_sample(path, "s", random_cells(5, 1))
    for _ in range(2):  # the first refusal leaves no lock
        with pytest.raises(StoreError, match="sample 's' is there already"), SampleWriter(path, "s", 5):
            pass
    assert not (path / ".incoming").exists()


def test_a_sample_that_is_not_whole_is_not_committed(path: Path) -> None:
    with pytest.raises(StoreError, match="not whole"), SampleWriter(path, "s", 4001) as writer:  # noqa: PT012
        writer.write_shard(1, OpenIslands.empty(1))
        writer.commit(random_obs(4001, 0), MEASURED, {})
    with pytest.raises(StoreError, match="4000 expected"), SampleWriter(path, "s", 4001) as writer:
        writer.write_shard(0, OpenIslands.empty(1))


@pytest.mark.parametrize(
    ("index", "columns", "message"),
    [
        (["a", "b", "c", "b", "a"], ["x", "y"], "found barcode 'b' twice"),
        ([1, "1", 2, 3, 4], ["x", "y"], "found barcode '1' twice"),
        (barcodes(5), ["x", "x"], "found the obs column 'x' twice"),
        (barcodes(5), ["x", "sample"], "found the obs column 'sample'"),
        (barcodes(5), ["x", "barcode"], "found the obs column 'barcode'"),
        (barcodes(5), ["x", "a/b"], "found the obs column 'a/b'"),
    ],
)
def test_an_obs_that_cannot_be_stored_is_refused(
    path: Path, index: list[str], columns: list[str], message: str
) -> None:
    obs = random_obs(5, 1)[["score", "n_fragments"]].set_axis(index).set_axis(columns, axis=1)
    with pytest.raises(InputError, match=f"atlas.zarr, sample 's': {message}"):
        write_sample(path, "s", random_cells(5, 1), obs=obs)
    assert committed_samples(path) == []


def test_the_index_counts_the_open_islands_of_each_shard(path: Path) -> None:
    matrix = random_cells(8100, 1, density=0.01)
    matrix = sparse.vstack([matrix[:4000], 0 * matrix[4000:8000], matrix[8000:]]).tocsr()
    matrix.eliminate_zeros()
    write_sample(path, "s", matrix)
    entry = json.loads((path / "samples/zarr.json").read_text())["attributes"]["index"][0]
    assert entry["shard_open"] == [matrix[:4000].nnz, 0, matrix[8000:].nnz]
    assert entry["n_open"] == matrix.nnz


def test_the_renames_of_a_commit_are_on_disk_before_the_next_step(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    rename, fsync = os.replace, os.fsync

    def told_rename(source: Path, target: Path) -> None:
        happened.append(f"rename {Path(target).relative_to(path)}")
        rename(source, target)

    def told_fsync(handle: int) -> None:
        happened.append(f"sync {os.path.relpath(os.readlink(f'/proc/self/fd/{handle}'), path)}")
        fsync(handle)

    monkeypatch.setattr(os, "replace", told_rename)
    monkeypatch.setattr(os, "fsync", told_fsync)
    write_sample(path, "s", random_cells(5, 1))
    sample = happened.index("rename samples/s")
    written = [step for step in happened[:sample] if step.startswith("sync")]
    files = [file for file in (path / "samples/s").rglob("*") if not is_shared(file)]
    parts = [file.relative_to(path / "samples/s") for file in files]
    assert len(parts) > 40
    assert {f"sync .incoming/s/sample/{part}" for part in parts} <= set(written)
    assert set(happened[sample + 1 : sample + 3]) == {"sync samples", "sync .incoming/s"}
    assert happened[sample + 3 :] == [
        "sync samples/.zarr.json.partial",
        "rename samples/zarr.json",
        "sync samples",
    ]


def is_shared(file: Path) -> bool:
    """Whether it is a link to a file of the islands, which is on disk since the store is there."""
    return file.is_file() and file.stat().st_nlink > 1


def test_samples_share_the_files_of_the_islands_on_a_disk(path: Path) -> None:
    write_sample(path, "s", random_cells(5, 1))
    for file in (path / "islands").glob("*/**/*"):
        in_var = path / "samples/s/var" / file.relative_to(path / "islands")
        assert file.is_dir() or file.samefile(in_var)


# Many writers


def enter_and_leave(path: Path, name: str, times: int, inside: "set[str] | None" = None) -> int:
    """Enter ``times`` times, as often as it takes; returns how often another was inside."""
    inside = set() if inside is None else inside
    refused = entered = 0
    while entered < times:
        try:
            with SampleWriter(path, name, 0):
                assert name not in inside
                inside.add(name)
                entered += 1
                inside.remove(name)
        except StoreError as error:
            if "another process is writing" not in str(error):
                raise
            refused += 1
    return refused


def test_threads_that_enter_and_leave_quickly_are_alone_inside_and_never_fail(path: Path) -> None:
    inside: set[str] = set()
    together(4, lambda i: enter_and_leave(path, "ab"[i % 2], 12, inside))
    assert not (path / ".incoming").exists()


def test_processes_that_enter_and_leave_quickly_never_fail(path: Path) -> None:
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        arguments = [(path, "a", 25), (path, "a", 25), (path, "b", 25)]
        pool.starmap_async(enter_and_leave, arguments, chunksize=1).get(60)
    assert not (path / ".incoming").exists()


def test_who_waits_for_a_store_that_gives_way_then_holds_the_lock_of_the_new_one(path: Path) -> None:
    def holds_the_lock_in_place() -> bool:
        with store_lock(path), (path / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    with ThreadPoolExecutor(1) as threads:
        with store_lock(path):
            waiting = threads.submit(holds_the_lock_in_place)
            time.sleep(0.1)  # until it waits; were it slower, it would hold the new lock at once
            path.rename(path.with_name("old.zarr"))
            create_store(path, SPACE, "insertion")
        assert waiting.result()


def test_samples_committed_at_once_are_all_indexed(path: Path) -> None:
    digests = together(4, lambda i: write_sample(path, f"s{i}", random_cells(5, i)))
    assert sorted(committed_samples(path)) == ["s0", "s1", "s2", "s3"]
    store = IslandStore.open(path)
    assert [store.samples[f"s{i}"].digest for i in range(4)] == digests
    np.testing.assert_array_equal(
        store.read(np.arange(20)).n_open.sum(), sum(s.n_open for s in store.samples.values())
    )
