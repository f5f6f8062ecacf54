"""A store in object storage, over HTTP: the same cells and digests as on a disk, whole or invisible."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from killed import PLAN, finish, rows_of, run_until_killed
from object_storage import ObjectStorage
from random_stores import MEASURED, SPACE, random_cells, random_obs, write_sample

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store import leases, objects
from annatac_scale.store.create import remove_empty
from annatac_scale.store.draft import open_draft
from annatac_scale.store.info import describe
from annatac_scale.store.leases import Owner, try_lease, wait_for_lease
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import place_of
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, committed_samples, create_store, replace_obs
from annatac_scale.store.zarr_prefix import zarr_store


@pytest.fixture
def url(s3: ObjectStorage) -> str:
    """An empty store in a bucket of its own."""
    url = f"{s3.bucket()}/some/atlas.zarr"
    create_store(url, SPACE, "insertion")
    return url


def test_a_store_in_object_storage_is_the_one_on_disk(s3: ObjectStorage, url: str, path: Path) -> None:
    first, second = random_cells(4321, 1), random_cells(3, 2)
    for store in (path, url):
        write_sample(store, "first", first)
        write_sample(store, "second", second)
        replace_obs(store, "second", random_obs(3, 5).assign(donor="D5"))
    here, there = IslandStore.open(path), IslandStore.open(url)
    assert there.digest == here.digest
    assert (
        there.read(np.arange(4324)).to_csr(len(SPACE)) != here.read(np.arange(4324)).to_csr(len(SPACE))
    ).nnz == 0
    assert there.obs().equals(here.obs())
    assert there.space.sha256 == SPACE.sha256
    np.testing.assert_array_equal(there.samples["first"].measured, MEASURED)
    assert s3.keys(url) == sorted(
        str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != ".lock"
    )
    infos = [describe(store).to_dict() | {"path": ""} for store in (here, there)]
    assert infos[0] == infos[1]


def test_anndata_reads_a_sample_from_object_storage(url: str) -> None:
    matrix = random_cells(300, 5)
    write_sample(url, "s", matrix)
    read = anndata.io.read_zarr(zarr_store(f"{url}/samples/s"))
    np.testing.assert_array_equal(read.X, matrix.toarray())
    np.testing.assert_array_equal(read.var["measured"], MEASURED)


def test_a_store_of_many_samples_opens_with_a_few_requests(s3: ObjectStorage, url: str) -> None:
    for i in range(5):
        write_sample(url, f"s{i}", random_cells(3, i))
    s3.requests.clear()
    store = IslandStore.open(url)
    assert len(s3.requests) <= 4
    assert len(store.read(np.arange(3)).islands) > 0


@pytest.mark.parametrize("write", ["create", "add"])
def test_what_is_no_store_is_refused_and_kept(s3: ObjectStorage, write: str) -> None:
    url = f"{s3.bucket()}/a"
    s3.put(f"{url}/thesis.txt", b"mine")
    with pytest.raises(StoreError, match=r"not an island store|no island store here"):
        create_store(url, SPACE, "insertion") if write == "create" else write_sample(
            url, "s", random_cells(3, 1)
        )
    assert s3.keys(url) == ["thesis.txt"]


def test_stores_that_hold_samples_or_drafts_do_not_give_way(s3: ObjectStorage, url: str) -> None:
    create_store(url, SPACE, "fragment")  # it was empty
    assert IslandStore.open(url).counting == "fragment"
    with open_draft(url, "s", PLAN):
        pass
    remove_empty(url)
    with pytest.raises(StoreError, match="holds counting 'fragment', but 'insertion'"):
        create_store(url, SPACE, "insertion")
    with open_draft(url, "s", PLAN) as draft:
        draft.discard()
    remove_empty(url)
    remove_empty(url)
    assert s3.keys(url) == []


def test_a_sample_is_invisible_until_the_index_names_it(s3: ObjectStorage, url: str) -> None:
    with SampleWriter(url, "s", 300) as writer:
        writer.write_shard(0, OpenIslands.from_csr(random_cells(300, 1)))
        assert "samples/s/X/c/0/0" in s3.keys(url)
        store = IslandStore.open(url)
        assert (store.n_cells, describe(store).unfinished) == (0, ["s"])
        with (
            pytest.raises(StoreError, match="another process is writing sample 's'"),
            SampleWriter(url, "s", 3),
        ):
            pass
    assert not [key for key in s3.keys(url) if "/s/" in key or key.startswith(".incoming")]
    digest = write_sample(url, "s", random_cells(300, 1))
    assert IslandStore.open(url).samples["s"].digest == digest
    with pytest.raises(StoreError, match="sample 's' is there already"), SampleWriter(url, "s", 300):
        pass


@pytest.mark.parametrize(
    "when", ["between shard and record", "between shards", "within commit", "after commit"]
)
def test_a_killed_run_on_object_storage_is_unfinished_and_goes_on(
    s3: ObjectStorage, url: str, path: Path, when: str
) -> None:
    for store in (path, url):
        write_sample(store, "before", random_cells(300, 1))
    with open_draft(path, "s", PLAN) as draft:
        finish(draft)
    run_until_killed(when, url)
    committed = when == "after commit"
    assert committed_samples(url) == ["before", "s"][: 1 + committed]
    assert describe(IslandStore.open(url)).unfinished == ([] if committed else ["s"])
    if committed:
        create_store(url, SPACE, "insertion")
    else:
        with open_draft(url, "s", PLAN) as draft:  # its owner is dead: the lease is taken over at once
            assert draft.written(1)
            finish(draft)
    assert IslandStore.open(url).digest == IslandStore.open(path).digest
    assert not [key for key in s3.keys(url) if key.startswith(".incoming/s")]


def test_another_plan_begins_anew_and_a_left_over_process_cannot_harm(s3: ObjectStorage, url: str) -> None:
    with open_draft(url, "s", PLAN) as old:
        old.write_shard(0, rows_of(0))
    with open_draft(url, "s", {"other": 1}) as draft:
        assert draft.written(0) is None
        assert not [key for key in s3.keys(url) if "/X/" in key]
        with pytest.raises(StoreError, match="not being written by this plan any more"):
            old.write_shard(0, rows_of(1))
        draft.write_shard(0, rows_of(0))
        draft.write_shard(0, rows_of(0))
        with pytest.raises(StoreError, match="found it there with other content"):
            draft.write_shard(0, rows_of(1))
        draft.discard()


def test_samples_committed_at_once_to_object_storage_are_all_indexed(s3: ObjectStorage, url: str) -> None:
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda i: write_sample(url, f"s{i}", random_cells(5, i)), range(6)))
    assert sorted(committed_samples(url)) == [f"s{i}" for i in range(6)]
    assert IslandStore.open(url).read(np.arange(30)).n_open.sum() > 0


def test_a_commit_whose_answer_is_lost_is_one_commit(
    s3: ObjectStorage, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, lost = objects.Prefix.replace, [True]

    def answer_lost(place: objects.Prefix, name: str, data: bytes, etag: str) -> str | None:
        done = replace(place, name, data, etag)
        if name == "samples/zarr.json" and lost.pop():
            lost.append(False)
            return None  # the server did it, and we were not told
        return done

    monkeypatch.setattr(objects.Prefix, "replace", answer_lost)
    write_sample(url, "s", random_cells(5, 1))
    assert committed_samples(url) == ["s"]


def test_a_server_that_fails_now_and_then_does_no_harm(s3: ObjectStorage, url: str) -> None:
    s3.failing = 2
    write_sample(url, "s", random_cells(5, 1))
    s3.failing = 2
    assert IslandStore.open(url).n_cells == 5


@pytest.mark.parametrize("killed_at", ["ready", "copying", "index"])
def test_a_killed_replacement_of_obs_is_settled(
    s3: ObjectStorage, url: str, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    old = write_sample(url, "s", random_cells(20, 1))
    target = {"ready": "_READY", "copying": "_settle_objects", "index": "change_index"}[killed_at]

    def kill(*arguments: Any) -> None:
        if killed_at == "copying":  # half of it
            store, name, aside = arguments
            for file in aside.names("obs")[::2]:
                store.write(f"{name}/{file}", aside.read(file))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if killed_at == "ready":
            patch.setattr(objects.Prefix, "write", lambda place, name, data: write_or_die(place, name, data))
        else:
            patch.setattr(f"annatac_scale.store.obs.{target}", kill)
        with pytest.raises(KeyboardInterrupt):
            replace_obs(url, "s", random_obs(20, 1)[["score"]])
    sample = IslandStore.open(url).samples["s"]
    expected = random_obs(20, 0) if killed_at == "ready" else random_obs(20, 1)[["score"]]
    assert list(sample.obs()["score"]) == list(expected["score"])
    assert list(sample.obs()) == list(expected)
    assert (sample.digest == old) == (killed_at == "ready")
    assert not [key for key in s3.keys(url) if key.startswith(".incoming")]
    assert replace_obs(url, "s", random_obs(20, 0)) == old


def write_or_die(place: objects.Prefix, name: str, data: bytes) -> None:
    if name == "ready.json":
        raise KeyboardInterrupt
    assert place.write_new(name, data) is not None


def test_a_shard_that_is_lost_or_damaged_is_refused(s3: ObjectStorage, url: str) -> None:
    write_sample(url, "s", random_cells(300, 1))
    shard = f"{url}/samples/s/X/c/0/0"
    whole = s3.get(shard)
    s3.put(shard, whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(StoreError, match=r"c/0/0.*damaged"):
        IslandStore.open(url).read(np.arange(3))
    s3.put(shard, whole[:100])
    with pytest.raises(StoreError, match=r"c/0/0.*damaged"):
        IslandStore.open(url).read(np.arange(3))
    place_of(url).remove("samples/s/X/c/0/0")
    with pytest.raises(StoreError, match="c/0/0: the file is lost"):
        IslandStore.open(url).read(np.arange(3))


def test_a_store_that_is_not_there_is_told(s3: ObjectStorage) -> None:
    with pytest.raises(
        StoreError, match=r"s3://.*/none: no island store here; make one with `annatac convert`"
    ):
        IslandStore.open(f"{s3.bucket()}/none")
    with pytest.raises(InputError, match="expected s3://bucket/name"):
        IslandStore.open("http://host/atlas.zarr")


# Leases


@pytest.fixture
def place(s3: ObjectStorage) -> objects.Prefix:
    return objects.Prefix(s3.bucket())


def test_a_lease_is_held_by_one_and_given_back(place: objects.Prefix) -> None:
    lease = try_lease(place, "lock")
    assert lease is not None
    assert try_lease(place, "lock") is None
    lease.release()
    assert place.names() == []
    with ThreadPoolExecutor(4) as threads:
        found = [lease for lease in threads.map(lambda _: try_lease(place, "lock"), range(4)) if lease]
    assert len(found) == 1
    found[0].release()


def test_who_waits_for_a_lease_gets_it_when_it_is_given_back(place: objects.Prefix) -> None:
    first = wait_for_lease(place, "lock")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(wait_for_lease, place, "lock")
        time.sleep(0.3)
        assert not waiting.done()
        first.release()
        waiting.result(30).release()


def test_a_lease_is_kept_fresh_and_taken_over_when_nobody_does(
    place: objects.Prefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_KEEPER", leases._Keeper())
    monkeypatch.setattr(leases, "REFRESH_S", 0.4)
    monkeypatch.setattr(leases, "STALE_S", -5.0)  # looks old at once: only its renewals tell that it lives
    lease = try_lease(place, "lock")
    assert lease is not None
    assert try_lease(place, "lock") is None
    leases._KEEPER.drop(lease)  # as if its machine had lost the network
    place.write("lock", Owner("elsewhere", 1, "1").body())
    other = try_lease(place, "lock")
    assert other is not None
    assert not lease.renew()
    lease.release()  # takes nothing from the other
    assert place.names() == ["lock"]
    other.release()


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(place: objects.Prefix) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    place.write("lock", replace(Owner.me(), pid=dead.pid, started="1").body())
    lease = try_lease(place, "lock")
    assert lease is not None
    lease.release()
    place.write("lock", replace(Owner.me(), host="elsewhere").body())
    assert try_lease(place, "lock") is None  # of another machine: it may live
    place.write("lock", b"torn")
    assert try_lease(place, "lock") is None
