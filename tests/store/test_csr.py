"""An exported AnnData holds what the store holds, entry by entry, and is whole or not there."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from object_storage import ObjectStorage
from random_stores import MEASURED, SPACE, barcodes, random_cells, random_obs, write_sample
from scipy import sparse

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store import csr, csr_targets
from annatac_scale.store.csr import export
from annatac_scale.store.csr_targets import Values
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, create_store

READ = {"cells.h5ad": anndata.read_h5ad, "csr.zarr": anndata.io.read_zarr}
both = pytest.mark.parametrize("name", READ)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and shards of which even a small store needs several."""
    monkeypatch.setattr(csr_targets, "CHUNK", 1000)
    monkeypatch.setattr(csr_targets, "SHARD", 3000)
    monkeypatch.setattr(csr, "CHUNK", 1000)


def exported(path: Path, out: Path, **options: Any) -> anndata.AnnData:
    report = export(IslandStore.open(path), out, **options)
    read = READ[out.name](out)
    assert (report.n_cells, report.n_islands) == read.shape
    assert report.n_open == read.X.nnz
    return read


def assert_x_is_that_of(store: IslandStore, cells: np.ndarray, read: anndata.AnnData) -> None:
    expected = store.read(cells)
    assert isinstance(read.X, sparse.csr_matrix)
    assert (read.X.data.dtype, read.X.indices.dtype, read.X.indptr.dtype) == (np.uint8, np.int32, np.int64)
    np.testing.assert_array_equal(read.X.data, expected.levels)
    np.testing.assert_array_equal(read.X.indices, expected.islands)
    np.testing.assert_array_equal(read.X.indptr, expected.offsets)
    read.X.check_format()


def plain(values: Any) -> list[Any]:
    return [None if pd.isna(value) else value for value in values]


@both
def test_the_cells_are_those_of_the_store(name: str, path: Path, tmp_path: Path) -> None:
    for seed, n_cells in enumerate((600, 1, 4100)):
        write_sample(path, f"s{seed}", random_cells(n_cells, seed, 0.01), seed)
    store = IslandStore.open(path)
    read = exported(path, tmp_path / name)
    assert_x_is_that_of(store, np.arange(4701), read)
    obs = store.obs()
    assert list(read.obs) == ["sample", "barcode", *[n for n in obs if n not in ("sample", "barcode")]]
    for column in obs:
        assert plain(read.obs[column]) == plain(obs[column]), column
    assert read.obs["n_fragments"].dtype == np.int64
    assert isinstance(read.obs["note"].dtype, pd.CategoricalDtype)
    assert read.obs_names.tolist() == (obs["sample"] + "_" + obs["barcode"]).tolist()
    assert read.obs_names.is_unique
    assert read.var_names.tolist() == SPACE.names()
    assert read.var["start"].tolist() == SPACE.start.tolist()
    assert read.var["chrom"].tolist() == [SPACE.chromosomes[code] for code in SPACE.chrom]
    assert list(read.var) == [
        "chrom",
        "start",
        "end",
        "genes",
        "measured",
        *[f"measured_s{i}" for i in range(3)],
    ]
    assert read.var["measured_s1"].tolist() == MEASURED.tolist()
    assert (read.uns["assembly"], read.uns["islands_sha256"]) == ("toy", SPACE.sha256)
    assert read.uns["store_digest"] == store.digest
    assert list(read.uns["samples"]) == ["s0", "s1", "s2"]


@both
def test_chosen_samples_come_in_the_order_of_the_store(name: str, path: Path, tmp_path: Path) -> None:
    for seed, sample in enumerate(("a", "b", "c")):
        obs = random_obs(300, seed).rename(lambda barcode, sample=sample: f"{sample}{barcode}")
        write_sample(path, sample, random_cells(300, seed), obs=obs)
    read = exported(path, tmp_path / name, samples=["c", "a"])
    assert_x_is_that_of(IslandStore.open(path), np.r_[0:300, 600:900], read)
    assert read.obs["sample"].tolist() == ["a"] * 300 + ["c"] * 300
    assert read.obs_names.tolist() == read.obs["barcode"].tolist()  # none comes twice
    assert read.obs["sample"].cat.categories.tolist() == ["a", "c"]
    assert read.uns["store_digest"] == IslandStore.open(path).digest
    with pytest.raises(InputError, match="found no sample 'd'; expected some of a, b, c"):
        export(IslandStore.open(path), tmp_path / "d.zarr", ["a", "d"])


@both
@pytest.mark.parametrize("n_cells", [None, 0, 3])
def test_nothing_at_all_is_exported_too(n_cells: int | None, name: str, path: Path, tmp_path: Path) -> None:
    """No sample, a sample without cells, cells without open islands."""
    if n_cells is not None:
        closed = sparse.csr_matrix((n_cells, len(SPACE)), dtype=np.uint8)
        write_sample(path, "s", closed, obs=pd.DataFrame({"x": np.ones(n_cells)}, barcodes(n_cells)))
    read = exported(path, tmp_path / name)
    assert (read.shape, read.X.nnz) == ((n_cells or 0, len(SPACE)), 0)
    assert_x_is_that_of(IslandStore.open(path), np.arange(n_cells or 0), read)
    assert read.obs_names.tolist() == barcodes(n_cells or 0)


@both
def test_samples_may_have_other_columns(name: str, path: Path, tmp_path: Path) -> None:
    large = 2**60 + 1
    first = {
        "type": pd.Categorical(["T", None, "B"]), "depth": [1, 2, 3], "id": [large, 1, 2], "ok": [True, False, True],
        "mixed": [1.5, np.nan, 3], "small": np.array([1, 2, 3], np.int8),
    }  # fmt: skip
    second = {
        "type": pd.Categorical(["B", "NK"]),
        "mixed": ["x", None],
        "small": np.array([300, -1], np.int16),
        "own": [0.5, 1.5],
    }
    write_sample(path, "a", random_cells(3, 1), obs=pd.DataFrame(first, ["x", "y", "z"]))
    write_sample(path, "b", random_cells(2, 2), obs=pd.DataFrame(second, ["x", "w"]))
    obs = exported(path, tmp_path / name).obs
    assert list(obs) == ["sample", "barcode", "type", "depth", "id", "ok", "mixed", "small", "own"]
    assert plain(obs["type"]) == ["T", None, "B", "B", "NK"]
    assert sorted(obs["type"].cat.categories) == ["B", "NK", "T"]
    assert plain(obs["depth"]) == [1.0, 2.0, 3.0, None, None]
    assert plain(obs["id"]) == [str(large), "1", "2", None, None]  # exact, which a float would not be
    assert plain(obs["ok"]) == ["True", "False", "True", None, None]
    assert plain(obs["mixed"]) == ["1.5", None, "3", "x", None]
    assert (plain(obs["small"]), obs["small"].dtype) == ([1, 2, 3, 300, -1], np.int16)
    assert plain(obs["own"]) == [None, None, None, 0.5, 1.5]
    assert obs.index.tolist() == ["a_x", "a_y", "a_z", "b_x", "b_w"]


@both
def test_names_stay_unique_where_one_sample_is_called_like_another(
    name: str, path: Path, tmp_path: Path
) -> None:
    for sample, texts in {"a": ["b_c", "x"], "a_b": ["c", "x"]}.items():
        write_sample(path, sample, random_cells(2, 1), obs=pd.DataFrame(index=texts))
    assert exported(path, tmp_path / name).obs_names.tolist() == ["a:b_c", "a:x", "a_b:c", "a_b:x"]


@both
def test_measured_means_measured_in_all(name: str, path: Path, tmp_path: Path) -> None:
    other = np.arange(len(SPACE)) % 5 != 0
    write_sample(path, "a", random_cells(2, 1))
    with SampleWriter(path, "b", 0) as writer:
        writer.commit(random_obs(0, 1), other, {})
    var = exported(path, tmp_path / name).var
    assert var["measured"].tolist() == (MEASURED & other).tolist()
    assert var["measured_b"].tolist() == other.tolist()


def test_the_arrays_are_chunked_compressed_and_sharded(path: Path, tmp_path: Path) -> None:
    write_sample(path, "a", random_cells(600, 1))
    store = IslandStore.open(path)
    for name in READ:
        export(store, tmp_path / name)
    with h5py.File(tmp_path / "cells.h5ad") as file:
        indices = file["X/indices"]
        assert (indices.chunks, indices.compression, indices.shuffle) == ((1000,), "gzip", True)
        assert dict(file["X"].attrs)["encoding-type"] == "csr_matrix"
    group = zarr.open_group(tmp_path / "csr.zarr", mode="r")
    assert group.metadata.zarr_format == 3
    assert (group["X/data"].chunks, group["X/data"].shards) == ((1000,), (3000,))
    assert "zstd" in str(group["X/data"].metadata.codecs[0].codecs)
    assert group["obs/barcode"].shards is None


@both
def test_an_export_that_is_there_is_kept_unless_told(name: str, path: Path, tmp_path: Path) -> None:
    write_sample(path, "a", random_cells(5, 1))
    exported(path, tmp_path / name)
    write_sample(path, "b", random_cells(7, 2))
    store = IslandStore.open(path)
    with pytest.raises(InputError, match=f"{name}: found it there; .*--overwrite"):
        export(store, tmp_path / name)
    assert READ[name](tmp_path / name).n_obs == 5
    assert exported(path, tmp_path / name, overwrite=True).n_obs == 12
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["atlas.zarr", name])


def test_places_that_cannot_be_are_refused_and_kept(path: Path, tmp_path: Path) -> None:
    store = IslandStore.open(path)
    (tmp_path / "thesis.zarr").mkdir()
    (tmp_path / "thesis.zarr" / "text").write_text("mine")
    (tmp_path / "link.h5ad").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for out, message in {
        "s3://bucket/cells.h5ad": "found an URL; expected a path on a disk",
        tmp_path / "cells.csv": "found the ending '.csv'; expected .h5ad or .zarr",
        tmp_path / "nosuch" / "cells.h5ad": "found no folder",
        tmp_path / "thesis.zarr": "found something that is no AnnData",
        tmp_path / "link.h5ad": "found something that is no AnnData",
        path: "found within the store",
        path / "samples" / "x.zarr": "found within the store",
    }.items():
        with pytest.raises(InputError, match=message):
            export(store, out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@both
def test_an_export_that_fails_leaves_nothing(name: str, path: Path, tmp_path: Path) -> None:
    write_sample(path, "a", random_cells(5000, 1, 0.01))
    shard = path / "samples/a/X/c/1/0"
    data = bytearray(shard.read_bytes())
    data[9] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match="c/1/0"):
        export(IslandStore.open(path), tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["atlas.zarr"]


def test_more_or_fewer_values_than_the_index_says_are_refused() -> None:
    written: list[int] = []
    values = Values(5, 2, lambda start, some: written.extend(some.tolist()), lambda: None)
    values.append(np.arange(3))
    assert written == [0, 1]
    with pytest.raises(StoreError, match="other than the 5 values"):
        values.append(np.arange(3))
    with pytest.raises(StoreError, match="--verify"):
        values.finish()


KILLED = """
import os, signal, sys
from annatac_scale.store import csr
from annatac_scale.store.store import IslandStore
csr.flush = csr.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
csr.export(IslandStore.open(sys.argv[1]), sys.argv[2], overwrite=True)
"""


@both
def test_an_export_that_is_killed_leaves_what_was_there(name: str, path: Path, tmp_path: Path) -> None:
    write_sample(path, "a", random_cells(5, 1))
    for there in (False, True):
        done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(tmp_path / name)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert (tmp_path / name).exists() == there
        if there:
            assert READ[name](tmp_path / name).n_obs == 5
        else:
            export(IslandStore.open(path), tmp_path / name)
    asides = {file.name for file in tmp_path.iterdir()} - {"atlas.zarr", name}
    assert all(aside.startswith(f".{name}.") and ".partial" in aside for aside in asides)


@both
def test_a_store_in_object_storage_is_exported(name: str, s3: ObjectStorage, tmp_path: Path) -> None:
    url = f"{s3.bucket()}/atlas.zarr"
    create_store(url, SPACE, "insertion")
    write_sample(url, "a", random_cells(300, 1))
    export(IslandStore.open(url), tmp_path / name)
    assert_x_is_that_of(IslandStore.open(url), np.arange(300), READ[name](tmp_path / name))


def test_an_exported_file_converts_back_to_the_same_levels_but_all_islands_are_measured(
    path: Path, tmp_path: Path
) -> None:
    """A level is min(counts, 5) of an island that is its own one peak."""
    from annatac_scale.ingest.convert import convert

    write_sample(path, "a", random_cells(300, 1))
    read = exported(path, tmp_path / "cells.h5ad")
    read.obs = read.obs.drop(columns=["sample", "barcode"])
    read.write_h5ad(tmp_path / "again.h5ad")
    sizes = tmp_path / "toy.sizes"
    sizes.write_text("chr1\t3000000\nchr2\t1002000\n")
    convert(
        [tmp_path / "again.h5ad"],
        assembly="toy",
        chrom_sizes=sizes,
        select="all",
        out=tmp_path / "again.zarr",
    )
    first, second = IslandStore.open(path), IslandStore.open(tmp_path / "again.zarr")
    assert second.samples["again"].x_sha256 == first.samples["a"].x_sha256
    assert second.samples["again"].measured.all()


RSS = """
import resource, sys
from annatac_scale.store.csr import export
from annatac_scale.store.store import IslandStore
export(IslandStore.open(sys.argv[1]), sys.argv[3], overwrite=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(IslandStore.open(sys.argv[2]), sys.argv[3], overwrite=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@both
def test_memory_follows_a_column_of_obs_and_not_the_cells(name: str, tmp_path: Path) -> None:
    """Ten times the cells, at most 250 bytes each, beside what the small store may not have filled of the buffers."""
    shard = OpenIslands.from_csr(random_cells(4000, 1, 0.6))
    n_open = int(shard.offsets[-1])
    for n_shards in (2, 20):
        create_store(tmp_path / f"{n_shards}.zarr", SPACE, "insertion")
        with SampleWriter(tmp_path / f"{n_shards}.zarr", "s", 4000 * n_shards) as writer:
            for number in range(n_shards):
                writer.write_shard(number, shard)
            writer.commit(random_obs(4000 * n_shards, 1), MEASURED, {})
    done = subprocess.run(
        [sys.executable, "-c", RSS, str(tmp_path / "2.zarr"), str(tmp_path / "20.zarr"), str(tmp_path / name)],
        capture_output=True, text=True, check=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    bound = 250 * 80_000 + (3 * 5 * csr_targets_shard() if name == "csr.zarr" else 0) + (16 << 20)
    assert int(done.stdout) < bound
    assert 5 * n_open * 20 > bound  # X would not fit


def csr_targets_shard() -> int:
    """Values of a shard as it is, not as this module sets it."""
    return 1 << 23
