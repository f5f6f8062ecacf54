"""Columns arrive in the obs of an h5ad by barcode; all else of the file is what it was."""

from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from annatac_scale.errors import InputError
from annatac_scale.store.export import write_obs_into_h5ad

BARCODES = ["AAA-1", "CCC-1", "GGG-1", "TTT-1"]


def write_source(path: Path, barcodes: list[str] | None = None, obs: bool = True) -> None:
    rng = np.random.default_rng(0)
    barcodes = BARCODES if barcodes is None else barcodes
    n = len(barcodes)
    columns = {
        "donor": pd.Categorical(rng.choice(["d1", "d2"], n)),
        "depth": rng.integers(0, 99, n),
        "note": [f"n{i}" for i in range(n)],
    }
    data = anndata.AnnData(
        sparse.csr_matrix(rng.poisson(1.0, (n, 5))),
        pd.DataFrame(columns if obs else {}, index=barcodes),
        obsm={"X_umap": rng.random((n, 2))},
        layers={"raw": rng.random((n, 5))},
        uns={"method": "x", "nested": {"a": np.arange(3)}},
    )
    data.raw = data.copy()
    data.write_h5ad(path)


def contents(path: Path) -> dict[str, Any]:
    """Every dataset of a file as bytes with its attributes, by place."""
    found: dict[str, Any] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        value = np.asarray(item).tolist() if isinstance(item, h5py.Dataset) else None
        attributes = {key: np.asarray(item.attrs[key]).tolist() for key in item.attrs}
        found[name] = value, attributes

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture
def columns() -> pd.DataFrame:
    """In another order than the file's, and without one of its cells."""
    return pd.DataFrame(
        {
            "best": ["T", "B", "T"],
            "confidence": np.array([0.25, 0.5, 1], np.float32),
            "second": [None, "T", None],
            "n_open": [3, 1, 2],
        },
        index=["TTT-1", "AAA-1", "CCC-1"],
    )


def test_columns_are_joined_by_barcode_and_absent_cells_are_missing(
    tmp_path: Path, source: Path, columns: pd.DataFrame
) -> None:
    write_obs_into_h5ad(source, columns, tmp_path / "out.h5ad")
    found = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert list(found.columns) == ["donor", "depth", "note", "best", "confidence", "second", "n_open"]
    expected = anndata.read_h5ad(source).obs.join(columns)
    assert list(found.index) == BARCODES
    for name in ("donor", "depth", "note"):
        assert found[name].tolist() == expected[name].tolist()
    for name in columns:
        assert found[name].isna().tolist() == expected[name].isna().tolist()
        assert found[name].dropna().tolist() == expected[name].dropna().tolist()
    assert found["confidence"].dtype == np.float32


def test_all_else_of_the_file_is_unchanged(tmp_path: Path, source: Path, columns: pd.DataFrame) -> None:
    before = contents(source)
    write_obs_into_h5ad(source, columns, tmp_path / "out.h5ad")
    after = contents(tmp_path / "out.h5ad")
    new = {name for name in after if name not in before}
    assert {tuple(name.split("/")[:2]) for name in new} == {("obs", name) for name in columns}
    for name, value in before.items():
        if name != "obs":
            assert after[name] == value, name
    assert after["obs"][1].keys() == before["obs"][1].keys()
    assert contents(source) == before


def test_columns_that_are_there_already_are_replaced(tmp_path: Path, source: Path) -> None:
    first = pd.DataFrame({"label": ["x"] * 4, "donor": [1, 2, 3, 4]}, index=BARCODES)
    write_obs_into_h5ad(source, first, tmp_path / "out.h5ad")
    second = pd.DataFrame({"label": ["y"] * 4}, index=BARCODES)
    write_obs_into_h5ad(tmp_path / "out.h5ad", second, tmp_path / "again.h5ad")
    found = anndata.read_h5ad(tmp_path / "again.h5ad").obs
    assert list(found.columns) == ["donor", "depth", "note", "label"]
    assert found["label"].tolist() == ["y"] * 4
    assert found["donor"].tolist() == [1, 2, 3, 4]


def test_an_obs_without_columns_gets_some(tmp_path: Path) -> None:
    write_source(tmp_path / "cells.h5ad", obs=False)
    write_obs_into_h5ad(tmp_path / "cells.h5ad", pd.DataFrame({"a": [1.5]}, ["GGG-1"]), tmp_path / "out.h5ad")
    found = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert found["a"].isna().tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (["AAA-1", "ACT-1"], r"cells\.h5ad: found no cell 'ACT-1' in obs \(1 of 2 are not there\)"),
        (["x", "y"], r"found no cell 'x' in obs \(2 of 2 are not there\)"),
    ],
)
def test_cells_that_the_file_does_not_have_are_refused(
    tmp_path: Path, source: Path, index: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_obs_into_h5ad(source, pd.DataFrame({"a": [1, 2]}, index), tmp_path / "out.h5ad")
    assert [file.name for file in tmp_path.iterdir()] == ["cells.h5ad"]


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_files_that_cannot_take_columns_are_refused(tmp_path: Path, columns: pd.DataFrame) -> None:
    write_source(tmp_path / "twice.h5ad", ["AAA-1", "AAA-1", "CCC-1", "TTT-1"])
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["obs"] = np.zeros(3, [("index", "S3"), ("a", "i4")])
    (tmp_path / "text.h5ad").write_text("not HDF5")
    with h5py.File(tmp_path / "none.h5ad", "w"):
        pass
    for name, message in {
        "twice": "found barcode 'AAA-1' twice",
        "old": r"layout of anndata before 0\.7",
        "text": r"cannot be made from .*text\.h5ad",
        "none": r"cannot be made from .*none\.h5ad",
        "absent": r"cannot be made from .*absent\.h5ad",
    }.items():
        with pytest.raises(InputError, match=message):
            write_obs_into_h5ad(tmp_path / f"{name}.h5ad", columns, tmp_path / "out.h5ad")
    with pytest.raises(InputError, match="nowhere"):
        write_obs_into_h5ad(tmp_path / "twice.h5ad", columns, tmp_path / "nowhere" / "out.h5ad")
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "out.h5ad").exists()
