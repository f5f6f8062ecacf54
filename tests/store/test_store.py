"""A store written, read back by us, by plain Zarr, by anndata; what is damaged or lost is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from random_stores import MEASURED, SPACE, random_cells, random_obs, write_sample
from scipy import sparse

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import create_store, replace_obs


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


def test_the_digest_covers_x_obs_and_measured_and_nothing_else(path: Path, tmp_path: Path) -> None:
    create_store(tmp_path / "again.zarr", SPACE, "insertion")
    digest = write_sample(path, "s", random_cells(20, 1))
    assert write_sample(tmp_path / "again.zarr", "other_name", random_cells(20, 1)) == digest
    assert write_sample(path, "t", random_cells(20, 2)) != digest
    assert write_sample(path, "u", random_cells(20, 1), seed=1) != digest


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the only shard of a store."""
    path = tmp_path_factory.mktemp("damaged") / "atlas.zarr"
    create_store(path, SPACE, "insertion")
    write_sample(path, "s", random_cells(300, 1))
    return path / "samples/s/X/c/0/0"


@given(place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_every_damaged_byte_of_a_shard_is_noticed(shard: Path, place: int, flip: int) -> None:
    whole = shard.read_bytes()
    data = bytearray(whole)
    data[place % len(data)] ^= flip
    shard.write_bytes(data)
    try:
        with pytest.raises(StoreError, match=r"c/0/0.*damaged"):
            IslandStore.open(shard.parents[5]).read(np.arange(300))
    finally:
        shard.write_bytes(whole)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_shard_cut_short_is_refused(path: Path, keep: int) -> None:
    write_sample(path, "s", random_cells(300, 1))
    shard = path / "samples/s/X/c/0/0"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(StoreError, match=r"damaged|cut short"):
        IslandStore.open(path).read(np.arange(300))


@pytest.mark.parametrize(
    ("lost", "cell"),
    [("c/1/0", 4100), ("c/0", 0), ("c", 0), (".", 0)],
    ids=["last shard", "folder of a shard", "all shards", "all of X"],
)
def test_lost_shards_are_not_taken_for_closed_ones(path: Path, lost: str, cell: int) -> None:
    write_sample(path, "before", random_cells(7, 2))
    write_sample(path, "s", random_cells(4101, 1))
    lose(path / "samples/s/X" / lost)
    store = IslandStore.open(path)
    assert len(store.read(np.arange(7)).islands) > 0
    with pytest.raises(
        StoreError, match=r"samples/s/X/c/[01]/0: the file is lost; its cells have [0-9,]+ open"
    ):
        store.read(np.array([7 + cell]))


def lose(path: Path) -> None:
    if path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the attributes of a group."""
    metadata = json.loads(file.read_text())
    change(metadata["attributes"])
    file.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"version": "3.0"}, r"format 3\.0, this annatac_scale reads 2\.0", id="newer"),
        pytest.param({"version": "0.9"}, r"format 0\.9, this annatac_scale reads 2\.0", id="older"),
        pytest.param({"n_levels": 9}, "found n_levels 9, expected 5", id="other levels"),
        pytest.param({"format": "mylab.store"}, "not an island store", id="another format"),
        pytest.param({"counting": None}, "found no attribute 'counting'", id="no counting"),
        pytest.param({"n_islands": None}, "found no attribute 'n_islands'", id="no n_islands"),
        pytest.param({"chromosomes": None}, "found no attribute 'chromosomes'", id="no chromosomes"),
    ],
)
def test_roots_that_are_not_as_specified_are_refused(
    path: Path, change: dict[str, Any], message: str
) -> None:
    edit(path / "zarr.json", lambda attributes: change_or_remove(attributes, change))
    with pytest.raises(StoreError, match=message):
        IslandStore.open(path)


def change_or_remove(attributes: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        attributes[key] = value
        if value is None:
            del attributes[key]


@pytest.mark.parametrize("text", ["", "[]", '{"attributes": 5}', "\xff"])
@pytest.mark.parametrize("file", ["zarr.json", "samples/zarr.json"])
def test_torn_metadata_is_a_store_error(path: Path, file: str, text: str) -> None:
    (path / file).write_text(text, encoding="latin-1")
    with pytest.raises(StoreError, match=r"zarr\.json"):
        IslandStore.open(path)


def test_a_sample_of_the_index_that_is_gone_is_refused(path: Path) -> None:
    write_sample(path, "s", random_cells(5, 1))
    (path / "samples/s").rename(path / "samples/elsewhere")
    with pytest.raises(StoreError, match="index names this sample, but it is gone"):
        IslandStore.open(path)


def test_an_entry_of_the_index_without_a_key_is_refused(path: Path) -> None:
    write_sample(path, "s", random_cells(5, 1))
    edit(path / "samples/zarr.json", lambda attributes: attributes["index"][0].pop("digest"))
    with pytest.raises(StoreError, match="found no 'digest' in an entry of the index"):
        IslandStore.open(path)


@pytest.mark.parametrize(("cells", "wrong"), [([2, -1], -1), ([0, 5, 7], 5), ([4, 6, -2], 6)])
def test_the_message_names_the_first_cell_id_that_is_out_of_range(
    path: Path, cells: list[int], wrong: int
) -> None:
    write_sample(path, "s", random_cells(5, 1))
    with pytest.raises(StoreError, match=f"cell ids run from 0 to 4, asked for {wrong}$"):
        IslandStore.open(path).read(np.array(cells))


def test_an_incomplete_sample_is_refused(path: Path) -> None:
    write_sample(path, "s", random_cells(5, 1))
    conversion = path / "samples/s/uns/conversion/zarr.json"
    metadata = json.loads(conversion.read_text())
    del metadata["attributes"]["complete"]
    conversion.write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="not complete"):
        IslandStore.open(path)


def test_sample_and_barcode_can_be_asked_for_like_any_column(path: Path) -> None:
    write_sample(path, "a", random_cells(2, 1))
    assert list(IslandStore.open(path).obs(["sample", "cell_type", "barcode"])) == [
        "sample",
        "barcode",
        "cell_type",
    ]
