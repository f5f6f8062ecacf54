"""Files that are in no store are predicted in one command; stores of other windows by overlap."""

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from predicted import assert_same_bytes
from scipy import sparse
from small_atlas import small_model

from annatac_scale import api
from annatac_scale.annotate import temporary_store as temporary_module
from annatac_scale.errors import AnnatacError, ConfigError, InputError, ModelError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest.convert import convert
from annatac_scale.progress import Silent
from annatac_scale.store.store import IslandStore

TOY = Assembly("toy", ("chr1",), (200_000,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cells.h5ad, its store, a model of it, and toy.chrom.sizes."""
    path = tmp_path_factory.mktemp("files")
    (path / "toy.chrom.sizes").write_text("chr1\t200000\n")
    write_h5ad(path / "cells.h5ad", 30)
    convert(path / "cells.h5ad", assembly=TOY, out=path / "cells.zarr", select="all")
    small_model(path / "model", space=IslandStore.open(path / "cells.zarr").space)
    return path


def write_h5ad(path: Path, n_cells: int) -> None:
    rng = np.random.default_rng(4)
    peaks = [f"chr1:{5000 * i}-{5000 * i + 500}" for i in range(40)]
    cells = [f"c{i}" for i in range(n_cells)]
    counts = sparse.csr_matrix(rng.poisson(0.3, (n_cells, 40)).astype(np.float32))
    anndata.AnnData(counts, pd.DataFrame(index=cells), pd.DataFrame(index=peaks)).write_h5ad(path)


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {"model": folder / "model", "chrom_sizes": folder / "toy.chrom.sizes", **more}


def test_an_h5ad_is_predicted_as_the_store_of_it_and_the_temporary_one_goes(
    folder: Path, tmp_path: Path
) -> None:
    api.predict(folder / "cells.zarr", model=folder / "model", out=tmp_path / "store")
    report = api.predict(
        folder / "cells.h5ad", out=tmp_path / "file", write_h5ad=tmp_path / "out.h5ad", **options(folder)
    )
    assert (report.n_cells, report.complete) == (30, True)
    assert_same_bytes(tmp_path / "store", tmp_path / "file")
    assert not list((tmp_path / "file").glob(".*"))
    labelled = anndata.read_h5ad(tmp_path / "out.h5ad")
    table = pd.read_parquet(tmp_path / "file").set_index("barcode").loc[labelled.obs_names]
    assert labelled.obs["annatac_label"].astype(str).tolist() == table["label"].tolist()


def test_embeddings_go_into_the_obsm_of_an_h5ad(folder: Path, tmp_path: Path) -> None:
    api.predict(
        folder / "cells.h5ad",
        out=tmp_path / "labels",
        embeddings=True,
        write_h5ad=tmp_path / "out.h5ad",
        **options(folder),
    )
    rows = zarr.open_group(tmp_path / "labels/_embeddings.zarr", mode="r")["cells"][:]
    labelled = anndata.read_h5ad(tmp_path / "out.h5ad")
    place = pd.Index(pd.read_parquet(tmp_path / "labels")["barcode"]).get_indexer(labelled.obs_names)
    np.testing.assert_array_equal(labelled.obsm["X_annatac"], rows[place].astype(np.float32))
    again = tmp_path / "again.h5ad"
    labelled.write_h5ad(again)
    report = api.predict(
        again, out=tmp_path / "more", embeddings=True, write_h5ad=tmp_path / "twice.h5ad", **options(folder)
    )
    assert report.h5ad == tmp_path / "twice.h5ad"
    np.testing.assert_array_equal(
        anndata.read_h5ad(report.h5ad).obsm["X_annatac"], labelled.obsm["X_annatac"]
    )


def test_the_consensus_of_an_obs_column_and_of_leiden_is_asked_for_in_the_same_command(
    folder: Path, tmp_path: Path
) -> None:
    data = anndata.read_h5ad(folder / "cells.h5ad")
    data.obs["group"] = np.where(np.arange(30) < 20, "a", "b")
    data.write_h5ad(tmp_path / "cells.h5ad")
    report = api.predict(
        tmp_path / "cells.h5ad", out=tmp_path / "labels", consensus="group", **options(folder)
    )
    table = pd.read_parquet(tmp_path / "labels").set_index("barcode").loc[data.obs_names]
    assert table["cluster"].tolist() == data.obs["group"].tolist()
    for name, own in table.groupby("cluster"):
        counts = own["label"].value_counts()
        assert set(own["consensus"]) <= set(counts.index[counts == counts.max()]), name
        assert own["consensus_share"].tolist() == pytest.approx([counts.max() / counts.sum()] * len(own))
    assert report.consensus is not None
    assert report.consensus.n_clusters == 2
    found = api.predict(
        tmp_path / "cells.h5ad",
        out=tmp_path / "more",
        consensus="leiden",
        consensus_resolution=0.5,
        **options(folder),
    )
    assert found.consensus is not None
    assert found.consensus.resolution == 0.5
    assert (tmp_path / "more/_embeddings.zarr").exists()
    store = folder / "cells.zarr"
    with pytest.raises(ConfigError, match="--part 1/2: found --consensus too"):
        api.predict(store, model=folder / "model", out=tmp_path / "x", consensus="group", part="1/2")


def test_several_files_are_samples_of_one_data_set(folder: Path, tmp_path: Path) -> None:
    write_h5ad(tmp_path / "one.h5ad", 1)
    write_h5ad(tmp_path / "three.h5ad", 3)
    api.predict([tmp_path / "one.h5ad", tmp_path / "three.h5ad"], out=tmp_path / "labels", **options(folder))
    assert pd.read_parquet(tmp_path / "labels")["sample"].tolist() == ["one", "three", "three", "three"]


def test_fragments_are_predicted_in_one_command(tmp_path: Path) -> None:
    with as_file(files("annatac_scale") / "data" / "archr_PBSmall.tsv.gz") as fragments:
        convert(fragments, assembly="hg19", out=tmp_path / "atlas.zarr", min_fragments=300)
        space = IslandStore.open(tmp_path / "atlas.zarr").space
        small_model(tmp_path / "model", space=space, vocabulary=np.arange(0, len(space), 7, dtype=np.int32))
        api.predict(tmp_path / "atlas.zarr", model=tmp_path / "model", out=tmp_path / "store")
        report = api.predict(fragments, model=tmp_path / "model", out=tmp_path / "file", min_fragments=300)
    assert report.n_cells > 10
    assert_same_bytes(tmp_path / "store", tmp_path / "file")


def test_a_prediction_that_stops_keeps_the_temporary_store_and_goes_on_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Silent):
        def task(self, name: str, *arguments: Any, **more: Any) -> Any:
            if name == "predict":
                raise AnnatacError("stopped")
            return super().task(name, *arguments, **more)

    with pytest.raises(AnnatacError, match="stopped"):
        api.predict(folder / "cells.h5ad", out=tmp_path / "labels", progress=Stopped(), **options(folder))
    left = tmp_path / "labels" / temporary_module._STORE
    assert IslandStore.open(left).n_cells == 30
    made = (left / "zarr.json").stat().st_mtime_ns
    opened: list[int] = []
    open_store = IslandStore.open

    def spy(path: Any, *arguments: Any) -> IslandStore:
        opened.append((Path(path) / "zarr.json").stat().st_mtime_ns)
        return open_store(path, *arguments)

    monkeypatch.setattr(IslandStore, "open", spy)
    api.predict(folder / "cells.h5ad", out=tmp_path / "labels", **options(folder))
    assert opened[-1] == made
    assert not left.exists()


def test_what_was_left_of_other_options_is_made_anew(folder: Path, tmp_path: Path) -> None:
    left = tmp_path / "labels" / temporary_module._STORE
    left.parent.mkdir()
    write_h5ad(tmp_path / "cells.h5ad", 7)
    convert(tmp_path / "cells.h5ad", assembly=TOY, out=left, select="all")
    assert api.predict(folder / "cells.h5ad", out=tmp_path / "labels", **options(folder)).n_cells == 30


def test_a_second_prediction_of_files_into_one_place_is_refused_and_changes_nothing(
    folder: Path, tmp_path: Path
) -> None:
    write_h5ad(tmp_path / "cells.h5ad", 7)

    class Meanwhile(Silent):
        def task(self, name: str, *arguments: Any, **more: Any) -> Any:
            if name == "predict":
                with pytest.raises(InputError, match="another process is predicting files into it"):
                    api.predict(tmp_path / "cells.h5ad", out=tmp_path / "labels", **options(folder))
            return super().task(name, *arguments, **more)

    api.predict(folder / "cells.h5ad", out=tmp_path / "labels", progress=Meanwhile(), **options(folder))
    api.predict(folder / "cells.zarr", model=folder / "model", out=tmp_path / "store")
    assert_same_bytes(tmp_path / "store", tmp_path / "labels")
    assert not list((tmp_path / "labels").glob(".*"))


def test_what_needs_a_store_that_stays_is_refused_of_files(folder: Path, tmp_path: Path) -> None:
    for more in ({"part": "1/2"}, {"write_obs": True}):
        with pytest.raises(ConfigError, match="found files to convert, expected an island store"):
            api.predict(folder / "cells.h5ad", out=tmp_path / "labels", **options(folder), **more)
    with pytest.raises(ConfigError, match="--chrom-sizes of a conversion"):
        api.predict(folder / "cells.zarr", out=tmp_path / "labels", **options(folder))
    assert not (tmp_path / "labels").exists()


def windows_store(path: Path, width: int) -> IslandStore:
    """The same peaks in bins of another width."""
    space = IslandSpace.all(TOY, width_bp=width)
    bed = path.with_suffix(".bed")
    bed.write_text(
        "".join(f"chr1\t{a}\t{b}\n" for a, b in zip(space.start.tolist(), space.end.tolist(), strict=True))
    )
    write_h5ad(path.with_suffix(".h5ad"), 30)
    convert(path.with_suffix(".h5ad"), assembly=TOY, out=path, select=str(bed))
    return IslandStore.open(path)


def test_a_store_of_other_windows_is_refused_with_a_table_and_projected_on_request(
    folder: Path, tmp_path: Path
) -> None:
    store = windows_store(tmp_path / "narrow.zarr", 1000)
    with pytest.raises(ModelError, match=r"(?s)width_bp:.*differs.*--project"):
        api.predict(store.path, model=folder / "model", out=tmp_path / "labels")
    lines: list[str] = []
    progress = Silent()
    progress.say = lines.append  # type: ignore[method-assign]
    report = api.predict(
        store.path, model=folder / "model", out=tmp_path / "labels", project=True, progress=progress
    )
    assert report.dropped == {}
    assert any(line.startswith("narrow: measures 35 of the model's 35 islands (100.0%)") for line in lines)
    # Each peak is one narrow window of its own, so that nothing is averaged away: the labels are those of the bins.
    api.predict(folder / "cells.zarr", model=folder / "model", out=tmp_path / "bins")
    columns = ["barcode", "best", "confidence", "n_open"]
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "labels")[columns], pd.read_parquet(tmp_path / "bins")[columns]
    )


def test_a_sample_that_covers_little_of_the_model_gets_a_warning_with_the_number(
    folder: Path, tmp_path: Path
) -> None:
    data = anndata.read_h5ad(folder / "cells.h5ad")
    data[:, :9].copy().write_h5ad(tmp_path / "few.h5ad")
    lines: list[str] = []
    progress = Silent()
    progress.say = lines.append  # type: ignore[method-assign]
    api.predict(tmp_path / "few.h5ad", out=tmp_path / "labels", progress=progress, **options(folder))
    (warning,) = (line for line in lines if "expected 50% or more" in line)
    assert warning.startswith("few: its peaks measure 8 of the model's 35 islands (22.9%)")
