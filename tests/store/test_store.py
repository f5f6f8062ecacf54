"""A store written, read back by us, by plain Zarr, by anndata; damaged and half-written samples are refused."""

import json
import multiprocessing
import multiprocessing.synchronize
import os
import signal
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from annatac_scale.errors import InputError, StoreError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, committed_samples, create_store, replace_obs

ASSEMBLY = Assembly("toy", ("chr1", "chr2"), (3_000_000, 1_002_000))
SPACE = IslandSpace.all(ASSEMBLY)
MEASURED = np.arange(len(SPACE)) % 7 != 0


def random_cells(n_cells: int, seed: int, density: float = 0.05) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    matrix = sparse.random(n_cells, len(SPACE), density, "csr", np.uint8, rng)
    matrix.data = rng.integers(1, 6, matrix.nnz).astype(np.uint8)
    return matrix


def random_obs(n_cells: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["B cell", "T cell"], n_cells)),
            "n_fragments": rng.integers(0, 9999, n_cells),
            "score": rng.random(n_cells),
            "note": [None if i % 3 == 0 else f"n{i}" for i in range(n_cells)],
        },
        index=[f"BC{i:05d}-1" for i in range(n_cells)],
    )


def write_sample(path: Path, name: str, matrix: sparse.csr_matrix, seed: int = 0) -> str:
    cells = OpenIslands.from_csr(matrix)
    with SampleWriter(path, name, len(cells)) as writer:
        for shard in reversed(range(-(-len(cells) // 4000))):
            writer.write_shard(shard, cells[shard * 4000 : (shard + 1) * 4000])
        return writer.commit(random_obs(len(cells), seed), MEASURED, {"inputs": ["x"]})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create_store(tmp_path / "atlas.zarr", SPACE, "insertion")
    return tmp_path / "atlas.zarr"


def test_cells_of_several_samples_come_back_by_cell_id(path: Path) -> None:
    first, second = random_cells(4321, 1), random_cells(3, 2)
    write_sample(path, "first", first)
    write_sample(path, "second", second)
    store = IslandStore.open(path)
    whole = sparse.vstack([first, second]).tocsr()
    assert store.n_cells == 4324
    ids = np.random.default_rng(0).choice(4324, 500)
    assert (store.read(ids).to_csr(len(SPACE)) != whole[ids]).nnz == 0
    blocks = [store.read_block(block) for block in store.blocks()]
    assert (OpenIslands.concatenate(blocks).to_csr(len(SPACE)) != whole).nnz == 0
    assert [(b.first_cell, b.n_cells) for b in store.blocks()][-2:] == [(4250, 71), (4321, 3)]


def test_plain_zarr_reads_the_same_levels(path: Path) -> None:
    matrix = random_cells(4100, 3)
    matrix[300:900] = 0  # whole blocks closed
    matrix.eliminate_zeros()
    write_sample(path, "s", matrix)
    x = zarr.open_array(path / "samples" / "s" / "X", mode="r")
    assert x.chunks == (250, len(SPACE))
    assert x.shards == (4000, len(SPACE))
    np.testing.assert_array_equal(x[:], matrix.toarray())
    np.testing.assert_array_equal(x[3990:4010, 5:9], matrix[3990:4010, 5:9].toarray())


def test_plain_zarr_writes_the_same_bytes(path: Path, tmp_path: Path) -> None:
    matrix = random_cells(600, 4)
    write_sample(path, "s", matrix)
    folder = path / "samples" / "s" / "X"
    other = tmp_path / "other"
    other.mkdir()
    (other / "zarr.json").write_bytes((folder / "zarr.json").read_bytes())
    zarr.open_array(other, mode="r+")[:] = matrix.toarray()
    assert (other / "c/0/0").read_bytes() == (folder / "c/0/0").read_bytes()


def test_anndata_reads_a_sample(path: Path) -> None:
    matrix = random_cells(300, 5)
    write_sample(path, "s", matrix)
    read = anndata.io.read_zarr(path / "samples" / "s")
    np.testing.assert_array_equal(read.X, matrix.toarray())
    assert list(read.obs_names) == list(random_obs(300, 0).index)
    assert list(read.obs["cell_type"]) == list(random_obs(300, 0)["cell_type"])
    np.testing.assert_array_equal(read.obs["score"], random_obs(300, 0)["score"])
    assert list(read.var["start"]) == list(SPACE.start)
    np.testing.assert_array_equal(read.var["measured"], MEASURED)


def test_all_closed_samples_and_samples_without_cells_are_whole(path: Path) -> None:
    write_sample(path, "closed", sparse.csr_matrix((10, len(SPACE)), dtype=np.uint8))
    write_sample(path, "none", sparse.csr_matrix((0, len(SPACE)), dtype=np.uint8))
    store = IslandStore.open(path)
    assert [s.n_cells for s in store.samples.values()] == [10, 0]
    assert len(store.read(np.arange(10)).islands) == 0
    assert len(store.obs()) == 10


def test_the_islands_come_back(path: Path) -> None:
    space = IslandStore.open(path).space
    assert space.sha256 == SPACE.sha256
    assert space.names() == SPACE.names()
    assert list(space.genes) == list(SPACE.genes)


def test_obs_of_all_samples_is_joined_and_missing_columns_stay_missing(path: Path) -> None:
    write_sample(path, "a", random_cells(5, 1))
    write_sample(path, "b", random_cells(4, 2))
    replace_obs(path, "b", random_obs(4, 0)[["cell_type"]].assign(donor="D5"))
    obs = IslandStore.open(path).obs(["donor", "cell_type"])
    assert list(obs.columns) == ["sample", "barcode", "donor", "cell_type"]
    assert obs["donor"].isna().tolist() == [True] * 5 + [False] * 4
    with pytest.raises(InputError, match=r"no obs column 'age'; there are .*cell_type"):
        IslandStore.open(path).obs(["age"])


def test_replacing_obs_leaves_x_alone_and_changes_the_digest(path: Path) -> None:
    write_sample(path, "s", random_cells(20, 1))
    shard = path / "samples/s/X/c/0/0"
    before, inode = IslandStore.open(path).samples["s"].digest, shard.stat().st_ino
    replace_obs(path, "s", random_obs(20, 1))
    after = IslandStore.open(path).samples["s"].digest
    assert after != before
    assert shard.stat().st_ino == inode
    replace_obs(path, "s", random_obs(20, 0))
    assert IslandStore.open(path).samples["s"].digest == before
    assert not (path / ".incoming").exists()


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_replacement_of_obs_killed_between_its_renames_is_settled(
    path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    write_sample(path, "s", random_cells(20, 1))
    old = IslandStore.open(path).samples["s"].digest
    done = []

    def move_until_killed(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("annatac_scale.store.writer._move", move_until_killed)
        patch.setattr("annatac_scale.store.writer._write_index", move_until_killed)
        with pytest.raises(KeyboardInterrupt):
            replace_obs(path, "s", random_obs(20, 1))
    sample = IslandStore.open(path).samples["s"]
    expected = random_obs(20, 1 if renames == 2 else 0)
    assert list(sample.obs()["score"]) == list(expected["score"])
    assert (sample.digest == old) == (renames < 2)
    assert not (path / ".incoming").exists()


def test_the_digest_covers_x_obs_and_measured_and_nothing_else(path: Path, tmp_path: Path) -> None:
    create_store(tmp_path / "again.zarr", SPACE, "insertion")
    digest = write_sample(path, "s", random_cells(20, 1))
    assert write_sample(tmp_path / "again.zarr", "other_name", random_cells(20, 1)) == digest
    assert write_sample(path, "t", random_cells(20, 2)) != digest
    assert write_sample(path, "u", random_cells(20, 1), seed=1) != digest


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
    context = multiprocessing.get_context("spawn")
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
    with pytest.raises(StoreError, match="sample 's' is there already"), SampleWriter(path, "s", 5):
        pass


def test_a_sample_that_is_not_whole_is_not_committed(path: Path) -> None:
    with pytest.raises(StoreError, match="not whole"), SampleWriter(path, "s", 4001) as writer:  # noqa: PT012
        writer.write_shard(1, OpenIslands.empty(1))
        writer.commit(random_obs(4001, 0), MEASURED, {})
    with pytest.raises(StoreError, match="4000 expected"), SampleWriter(path, "s", 4001) as writer:
        writer.write_shard(0, OpenIslands.empty(1))


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "-x", "a b", "a\n"])
def test_sample_names_that_could_leave_the_store_are_refused(path: Path, name: str) -> None:
    with pytest.raises(InputError, match="sample name"), SampleWriter(path, name, 1):
        pass


@given(place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_every_damaged_byte_of_a_shard_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "atlas.zarr"
    create_store(path, SPACE, "insertion")
    write_sample(path, "s", random_cells(300, 1))
    shard = path / "samples/s/X/c/0/0"
    data = bytearray(shard.read_bytes())
    data[place % len(data)] ^= flip
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"c/0/0.*damaged"):
        IslandStore.open(path).read(np.arange(300))


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_shard_cut_short_is_refused(path: Path, keep: int) -> None:
    write_sample(path, "s", random_cells(300, 1))
    shard = path / "samples/s/X/c/0/0"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(StoreError, match=r"damaged|cut short"):
        IslandStore.open(path).read(np.arange(300))


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
    with pytest.raises(StoreError, match="not an island store"):
        create_store(tmp_path / "full", SPACE, "insertion")
    assert (tmp_path / "full" / "thesis.txt").exists()
    with pytest.raises(StoreError, match="annatac convert"):
        IslandStore.open(tmp_path / "nowhere")


def test_a_store_without_samples_gives_way_to_one_of_other_islands(path: Path) -> None:
    create_store(path, SPACE, "fragment")
    assert IslandStore.open(path).counting == "fragment"


def test_a_store_of_a_newer_format_is_refused(path: Path) -> None:
    root = path / "zarr.json"
    metadata = json.loads(root.read_text())
    metadata["attributes"]["version"] = "2.0"
    root.write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match=r"format 2\.0, this annatac_scale reads 1\.0"):
        IslandStore.open(path)


def test_an_incomplete_sample_is_refused(path: Path) -> None:
    write_sample(path, "s", random_cells(5, 1))
    conversion = path / "samples/s/uns/conversion/zarr.json"
    metadata = json.loads(conversion.read_text())
    del metadata["attributes"]["complete"]
    conversion.write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="not complete"):
        IslandStore.open(path)
