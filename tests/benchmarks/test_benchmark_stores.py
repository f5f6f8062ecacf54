"""The generator of the benchmarks' stores: the same cells in every form, spread as its options say."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annatac_scale.store.store import IslandStore

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
stores: Any = importlib.import_module("store_writer")

SPEC = stores.Spec(cells=9_000, islands=800, open=60, types=6, samples=2, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    stores.make_store(folder, SPEC)
    stores.make_h5ad(folder, SPEC)
    return folder


def dense(cells: Any, n_islands: int) -> np.ndarray:
    return cells.to_csr(n_islands).toarray()


def test_store_and_h5ad_hold_the_generated_cells(folder: Path) -> None:
    expected = dense(stores.Cells(SPEC).read(0, SPEC.cells), SPEC.islands)
    store = IslandStore.open(folder / stores.STORE)
    found = dense(store.read(np.arange(SPEC.cells)), SPEC.islands)
    data = anndata.read_h5ad(folder / stores.H5AD)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(data.X.toarray(), expected)
    obs = store.obs(["cell_type"])
    assert len(store.samples) == 2
    assert obs["barcode"].nunique() == SPEC.cells
    assert obs["barcode"].tolist() == data.obs_names.tolist()
    assert obs["cell_type"].astype(str).tolist() == data.obs["cell_type"].astype(str).tolist()
    assert store.space.names() == data.var_names.tolist()


def test_cells_are_distinct_islands_in_order_with_levels_as_asked() -> None:
    cells = stores.Cells(replace(SPEC, cells=4_000)).read(0, 4_000)
    for cell in range(len(cells)):
        own = cells.islands[cells.offsets[cell] : cells.offsets[cell + 1]]
        assert (np.diff(own) > 0).all()
        assert 0 <= own[0] <= own[-1] < SPEC.islands
    shares = np.bincount(cells.levels, minlength=6)[1:] / len(cells.levels)
    np.testing.assert_allclose(shares, stores.LEVELS, atol=0.005)


def test_depths_are_lognormal_about_the_median() -> None:
    n_open = stores.Cells(stores.Spec()).n_open(0, 100_000)
    found = [np.median(n_open), n_open.mean(), *np.percentile(n_open, [5, 95])]
    np.testing.assert_allclose(found, [1501, 1659, 712, 3140], rtol=0.02)


def test_any_run_of_cells_is_the_same_however_it_is_cut() -> None:
    cells = stores.Cells(SPEC)
    whole, part = cells.read(0, 500), stores.Cells(replace(SPEC, samples=3)).read(123, 300)
    np.testing.assert_array_equal(whole[123:300].islands, part.islands)
    np.testing.assert_array_equal(whole[123:300].levels, part.levels)
    other = stores.Cells(replace(SPEC, seed=4)).read(0, 500)
    assert len(other.islands) != len(whole.islands)


def test_types_are_equally_many_and_differ_in_their_islands() -> None:
    shuffled, in_order = stores.Cells(replace(SPEC, order="shuffled")), stores.Cells(SPEC)
    assert (np.diff(in_order.types) >= 0).all()
    assert (np.diff(shuffled.types) < 0).any()
    assert np.bincount(shuffled.types).tolist() == np.bincount(in_order.types).tolist() == [1_500] * 6
    is_open = dense(in_order.read(0, SPEC.cells), SPEC.islands) > 0
    halves = [[is_open[in_order.types == kind][half::2].mean(0) for half in (0, 1)] for kind in range(2)]
    within = np.corrcoef(halves[0][0], halves[0][1])[0, 1]
    between = np.corrcoef(halves[0][0], halves[1][0])[0, 1]
    assert within > 0.98
    assert between < 0.8


@settings(max_examples=30)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40))
def test_alias_tables_give_each_island_its_weight(weights: list[float]) -> None:
    share, other = stores.alias_of(np.array(weights))
    found = share.copy()
    np.add.at(found, other, 1 - share)
    np.testing.assert_allclose(found / len(weights), np.array(weights) / sum(weights), atol=1e-9)
    assert (share >= 0).all()
    assert (share <= 1 + 1e-9).all()


def test_a_store_that_is_there_is_not_made_again_unless_options_or_format_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(SPEC, cells=300, samples=1)
    path = stores.make_store(tmp_path, small)
    (path / "touched").touch()
    assert (stores.make_store(tmp_path, small) / "touched").exists()
    other = replace(small, seed=5)
    assert not (stores.make_store(tmp_path, other) / "touched").exists()
    (path / "touched").touch()
    monkeypatch.setattr(stores, "FORMAT_VERSION", "0.1")
    assert not (stores.make_store(tmp_path, other) / "touched").exists()


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        stores.shutil, "disk_usage", lambda path: stores.shutil._ntuple_diskusage(0, 0, 10**8)
    )
    with pytest.raises(SystemExit, match=r"0\.1 GB are free"):
        stores.make_store(tmp_path, SPEC)
    assert not (tmp_path / stores.STORE).exists()
