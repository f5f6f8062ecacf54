"""Labels and columns of cells: from an h5ad, a table, or a sheet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrix_files import BARCODES, some_anndata, some_counts
from stores import (
    FRAGMENTS,
    Convert,
    all_bytes,
    digests,
    shard_bytes,
    write_lines,
    write_peaks,
)

from annatac_scale.errors import InputError
from annatac_scale.ingest.labels import join_obs
from annatac_scale.store.store import IslandStore


def test_obs_of_an_h5ad_are_carried_over(tmp_path: Path, toy_convert: Convert) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    toy_convert(tmp_path / "a.h5ad")
    obs = IslandStore.open(tmp_path / "atlas.zarr").samples["a"].obs()
    assert obs["cell_type"].tolist() == ["B", "T", "NK"] * 10
    assert obs["depth"].tolist() == (np.arange(30) / 4).tolist()
    assert obs["passed"].tolist() == [True, False] * 15
    assert obs["donor"].tolist() == [f"D{i % 2}" for i in range(30)]
    assert obs["n_counts_given"].tolist() == list(range(30))
    assert obs["n_counts"].tolist() == np.asarray(some_counts().sum(axis=1)).ravel().tolist()


def test_labels_join_at_conversion_or_later_alike_and_x_stays(
    tmp_path: Path, toy_convert: Convert, said: Any
) -> None:
    write_lines(tmp_path / "a.tsv", FRAGMENTS)
    rows = [(barcode, "TB"[i % 2], i) for i, barcode in enumerate(BARCODES[:20])]
    labels = write_lines(tmp_path / "cells.tsv", [("barcode", "cell_type", "age"), *rows, ("Z", "T", 1)])
    toy_convert(tmp_path / "a.tsv", "at.zarr", min_fragments=0, obs=labels)
    for out in ("later.zarr", "again.zarr"):
        toy_convert(tmp_path / "a.tsv", out, min_fragments=0)
    before = shard_bytes(tmp_path / "later.zarr", "a")
    join_obs(tmp_path / "later.zarr", labels, said)
    report = toy_convert(tmp_path / "a.tsv", "again.zarr", min_fragments=0, obs=labels)
    assert report.relabelled == ["a"]
    assert shard_bytes(tmp_path / "later.zarr", "a") == before
    assert (
        digests(tmp_path / "at.zarr") == digests(tmp_path / "later.zarr") == digests(tmp_path / "again.zarr")
    )
    obs = IslandStore.open(tmp_path / "later.zarr").samples["a"].obs()
    assert obs["cell_type"].isna().sum() == 10
    assert obs.loc[BARCODES[1], ["cell_type", "age"]].tolist() == ["B", 1]
    assert "20 of 30 cells have labels" in said


def test_labels_of_no_cell_are_refused_before_anything_changes(tmp_path: Path, toy_convert: Convert) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    write_lines(tmp_path / "b.tsv", FRAGMENTS)
    toy_convert([tmp_path / "a.h5ad", tmp_path / "b.tsv"], min_fragments=0)
    before = all_bytes(tmp_path / "atlas.zarr")
    wrong = write_lines(tmp_path / "wrong.tsv", [("barcode", "t"), ("nobody", "x")])
    with pytest.raises(InputError, match=r"wrong\.tsv: found barcodes such as 'nobody', none of a cell"):
        join_obs(tmp_path / "atlas.zarr", wrong)
    write_lines(wrong, [("barcode", "sample", "t"), (BARCODES[0], "elsewhere", "x")])
    with pytest.raises(InputError, match="of samples 'elsewhere', none of a cell"):
        join_obs(tmp_path / "atlas.zarr", wrong)
    assert all_bytes(tmp_path / "atlas.zarr") == before
    write_lines(wrong, [("barcode", "sample", "t"), (BARCODES[0], "b", "x")])
    join_obs(tmp_path / "atlas.zarr", wrong)
    assert IslandStore.open(tmp_path / "atlas.zarr").obs(["t"])["t"].dropna().tolist() == ["x"]


def test_a_sheet_converts_all_its_samples(tmp_path: Path, toy_convert: Convert) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    write_lines(tmp_path / "f.tsv", FRAGMENTS)
    write_peaks(tmp_path / "p.bed")
    write_lines(tmp_path / "cells.txt", [(barcode,) for barcode in BARCODES[:5]])
    rows = [("sample", "path", "peaks", "barcodes", "donor"), ("one", "a.h5ad", "", "", "D1")]
    sheet = write_lines(tmp_path / "samples.tsv", [*rows, ("two", "f.tsv", "p.bed", "cells.txt", "D2")])
    toy_convert([], sheet=sheet)
    store = IslandStore.open(tmp_path / "atlas.zarr")
    assert {name: sample.n_cells for name, sample in store.samples.items()} == {"one": 30, "two": 5}
    assert store.obs(["donor"])["donor"].tolist() == ["D1"] * 30 + ["D2"] * 5
    with pytest.raises(InputError, match="found a sheet together with inputs"):
        toy_convert([tmp_path / "a.h5ad"], sheet=sheet)
