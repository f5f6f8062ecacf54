"""Drafts outlive the processes that write them, and never show before they are whole."""

import contextlib
import errno
import multiprocessing
import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed import N_SHARDS, PLAN, damage, finish, rows_of, run_until_killed
from random_stores import MEASURED, SPACE, random_cells, random_obs, write_sample

from annatac_scale.errors import StoreError
from annatac_scale.store import draft as drafts
from annatac_scale.store.create import remove_empty
from annatac_scale.store.draft import open_draft
from annatac_scale.store.info import describe
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import committed_samples, create_store

MOMENTS = [
    "before shards",
    "within a shard",
    "between shard and record",
    "between shards",
    "within commit",
    "between rename and index",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The store digest of a run that nobody killed."""
    path = tmp_path_factory.mktemp("undisturbed") / "atlas.zarr"
    create_store(path, SPACE, "insertion")
    write_sample(path, "before", random_cells(300, 1))
    with open_draft(path, "s", PLAN) as draft:
        finish(draft)
    return IslandStore.open(path).digest


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("when", MOMENTS)
def test_a_killed_run_is_unfinished_harms_no_other_sample_and_goes_on(
    path: Path, when: str, undisturbed: str
) -> None:
    write_sample(path, "before", random_cells(300, 1))
    before = all_bytes(path / "samples/before")
    run_until_killed(when, path)
    store = IslandStore.open(path)
    assert list(store.samples) == ["before"]
    assert describe(store).unfinished == ["s"]
    kept = [] if when == "before shards" else [1]
    with open_draft(path, "s", PLAN) as draft:
        found = [shard for shard in range(N_SHARDS) if draft.written(shard)]
        assert found == ([0, 1, 2] if when in ("within commit", "between rename and index") else kept)
        finish(draft)
    assert IslandStore.open(path).digest == undisturbed
    assert describe(IslandStore.open(path)).unfinished == []
    assert all_bytes(path / "samples/before") == before
    assert not (path / ".incoming").exists()
    cells = IslandStore.open(path).read(np.arange(300 + 4000, 300 + 8000)).to_csr(len(SPACE))
    assert (cells != rows_of(1).to_csr(len(SPACE))).nnz == 0


@pytest.mark.parametrize("again", ["create", "write"])
def test_what_a_run_killed_after_its_commit_left_is_removed(path: Path, again: str, undisturbed: str) -> None:
    write_sample(path, "before", random_cells(300, 1))
    run_until_killed("after commit", path)
    assert IslandStore.open(path).digest == undisturbed
    assert describe(IslandStore.open(path)).unfinished == []
    assert (path / ".incoming/s").exists()
    if again == "create":
        create_store(path, SPACE, "insertion")
    else:
        with pytest.raises(StoreError, match="'s' is there already"), open_draft(path, "s", PLAN):
            pass
    assert not (path / ".incoming").exists()
    assert IslandStore.open(path).digest == undisturbed


def test_another_plan_begins_anew(path: Path) -> None:
    with open_draft(path, "s", {"a": 1, "b": [1.5, None]}) as draft:
        draft.write_shard(0, rows_of(0))
        draft.place.write("ranges/0", b"spilled")
    with open_draft(path, "s", {"b": [1.5, None], "a": 1}) as draft:
        assert draft.written(0)
        assert draft.recorded() == [0]
        assert draft.place.read("ranges/0") == b"spilled"
        stale = pickle.loads(pickle.dumps(draft))
    with open_draft(path, "s", {"a": 2}) as draft:
        assert draft.written(0) is None
        assert draft.place.names() == ["plan.json"]
        with pytest.raises(StoreError, match="'s' is not being written by this plan any more"):
            stale.write_shard(0, rows_of(0))
        finish(draft)
    with pytest.raises(StoreError, match="not being written by this plan any more"):
        stale.write_shard(0, rows_of(0))


def test_shards_that_a_power_cut_took_are_not_taken_for_written(path: Path) -> None:
    with open_draft(path, "s", PLAN) as draft:
        for shard in range(N_SHARDS):
            draft.write_shard(shard, rows_of(shard))
        folder = Path(draft.place.location)
        damage(folder / "sample/X/c/0/0")
        damage(folder / "shards/1.json")
        assert [draft.written(shard) is None for shard in range(N_SHARDS)] == [True, True, False]
        (folder / "sample/X/c/2/0").unlink()
        assert draft.written(2) is None


def test_all_closed_shards_are_written_too(path: Path) -> None:
    with open_draft(path, "s", PLAN) as draft:
        record = draft.write_shard(0, rows_of(0)[:0])
        assert draft.written(0) == record
        draft.discard()
        assert draft.written(0) is None


def test_a_plan_that_was_torn_begins_anew(path: Path) -> None:
    with open_draft(path, "s", PLAN) as draft:
        draft.write_shard(0, rows_of(0))
        damage(Path(draft.place.location) / "plan.json")
    with open_draft(path, "s", PLAN) as draft:
        assert draft.written(0) is None


@pytest.mark.parametrize("wrong", ["missing", "twice", "of other cells", "too many"])
def test_a_commit_needs_each_shard_once(path: Path, wrong: str) -> None:
    with open_draft(path, "s", PLAN) as draft:
        records = [draft.write_shard(shard, rows_of(shard)) for shard in range(N_SHARDS)]
        if wrong == "missing":
            records = records[1:]
        elif wrong == "twice":
            records.append(records[0])
        elif wrong == "of other cells":
            records[2] = draft.write_shard(2, rows_of(2)[:5])
        else:
            records.append(draft.write_shard(3, rows_of(2)[:0]))
        with pytest.raises(StoreError, match="'s' is not whole"):
            draft.commit(records, random_obs(9000, 3), MEASURED, {})
    assert committed_samples(path) == []


def _write(draft: drafts.Draft, shard: int) -> Any:
    return draft.write_shard(shard, rows_of(shard))


def test_shards_are_written_by_other_processes(path: Path, undisturbed: str) -> None:
    write_sample(path, "before", random_cells(300, 1))
    with open_draft(path, "s", PLAN) as draft:
        with multiprocessing.get_context("forkserver").Pool(2) as pool:
            records = pool.starmap(_write, [(draft, shard) for shard in reversed(range(N_SHARDS))])
        draft.commit(records, random_obs(9000, 3), MEASURED, {})
    assert IslandStore.open(path).digest == undisturbed


def test_hundreds_of_drafts_are_open_at_once(path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 60, limits[1]))
    try:
        with contextlib.ExitStack() as stack:
            open_drafts = [stack.enter_context(open_draft(path, f"s{i}", PLAN)) for i in range(200)]
            assert len(os.listdir("/proc/self/fd")) < n_open + 210
            assert len(describe(IslandStore.open(path)).unfinished) == 200
            for draft in open_drafts:
                draft.discard()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not (path / ".incoming").exists()


def test_a_store_with_a_draft_is_neither_empty_nor_gives_way(path: Path) -> None:
    with open_draft(path, "s", PLAN):
        pass
    remove_empty(path)
    with pytest.raises(StoreError, match="holds counting 'insertion'"):
        create_store(path, SPACE, "fragment")
    with open_draft(path, "s", PLAN) as draft:
        draft.discard()
    remove_empty(path)
    assert not path.exists()


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["write", "mkdir", "fsync"])
def test_a_full_disk_stops_a_commit_that_the_same_run_can_repeat(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, undisturbed: str
) -> None:
    write_sample(path, "before", random_cells(300, 1))
    with open_draft(path, "s", PLAN) as draft:
        records = [draft.write_shard(shard, rows_of(shard)) for shard in range(N_SHARDS)]
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full_disk)
            with pytest.raises(
                StoreError, match=r"cannot be written .No space left on device.; expected room"
            ):
                draft.commit(records, random_obs(9000, 3), MEASURED, {})
        assert list(IslandStore.open(path).samples) == ["before"]
        draft.commit(records, random_obs(9000, 3), MEASURED, {})
    assert IslandStore.open(path).digest == undisturbed


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="mounts a small disk: root only"
)
def test_a_disk_that_is_really_full_is_told_and_the_draft_goes_on(path: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=2m tmpfs {disk} 2>/dev/null"):
        pytest.skip("this root may not mount")
    try:
        store = shutil.copytree(path, disk / "atlas.zarr")
        with open_draft(store, "s", PLAN) as draft:
            draft.write_shard(1, rows_of(1))
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free))
            with pytest.raises(
                StoreError, match=r"cannot be written .No space left on device.; expected room"
            ):
                draft.write_shard(0, rows_of(0))
            assert (draft.written(0), draft.written(1) is None) == (None, False)
            (disk / "other").unlink()
            finish(draft)
        assert IslandStore.open(store).n_cells == 9000
    finally:
        os.system(f"umount {disk}")
