"""The benchmark of accuracy: its bars, splits, rows and page; a quick run from the command line."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats
from sklearn.linear_model import LogisticRegression

from annatac_scale import baseline
from annatac_scale.errors import InputError
from annatac_scale.model.heads import CnnHead

ROOT = Path(__file__).parents[2]
ACCURACY = ROOT / "benchmarks" / "accuracy"
sys.path.append(str(ACCURACY))
bars: Any = importlib.import_module("baselines")
sets: Any = importlib.import_module("sets")
rows: Any = importlib.import_module("rows")
table: Any = importlib.import_module("table")
page: Any = importlib.import_module("page")
grid: Any = importlib.import_module("grid")
plans: Any = importlib.import_module("plans")
networks: Any = importlib.import_module("networks")


@pytest.fixture
def planted() -> tuple[sparse.csr_matrix, np.ndarray]:
    """90 cells of three types over 200 islands, each type with 30 islands of its own that are open more often."""
    rng = np.random.default_rng(0)
    types = np.repeat(["a", "b", "c"], 30)
    chance = np.full((90, 200), 0.1)
    for number in range(3):
        chance[number * 30 : number * 30 + 30, number * 30 : number * 30 + 30] = 0.25
    levels = (rng.random((90, 200)) < chance) * rng.integers(1, 4, (90, 200))
    return sparse.csr_matrix(levels.astype(np.uint8)), types


def test_the_bar_tunes_as_the_package_does_on_its_grid(
    planted: tuple[sparse.csr_matrix, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    levels, types = planted
    order = np.random.default_rng(1).permutation(90)
    train, test = np.sort(order[:60]), np.sort(order[60:])
    monkeypatch.setattr(bars, "_beyond", lambda best, tried: [])
    done = bars.regression(levels, types, train, test)
    expected, tuned = baseline.tuned_logistic_regression(levels, types, train, test, 0)
    np.testing.assert_array_equal(done.types, expected)
    assert done.tuned == tuned


@pytest.mark.parametrize("strength", [0.03, 3.0])
def test_rotated_rows_predict_as_the_sparse_ones(
    planted: tuple[sparse.csr_matrix, np.ndarray], strength: float
) -> None:
    levels, types = planted
    x = bars.idf_rows(levels, np.arange(90))
    rotated = bars.spanned(x)
    fits = [
        LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(rows, types).predict_proba(rows)
        for rows in (x, rotated)
    ]
    np.testing.assert_allclose(*fits, atol=1e-4)


def test_c_widens_only_where_the_best_is_at_an_edge() -> None:
    assert bars._beyond(0.03, [0.003, 0.03, 0.3]) == []
    assert bars._beyond(0.003, [0.003, 0.03]) == [pytest.approx(0.0003)]
    assert bars._beyond(30.0, [3.0, 30.0]) == [300.0]
    assert bars._beyond(bars.SMALLEST_STRENGTH, [bars.SMALLEST_STRENGTH, 1.0]) == []


def test_idf_rows_are_binary_times_idf_of_one_length(
    planted: tuple[sparse.csr_matrix, np.ndarray],
) -> None:
    levels, _ = planted
    fitted = np.arange(40)
    dense = (levels.toarray() > 0).astype(float)
    expected = dense * np.log1p(40 / np.maximum(dense[:40].sum(0), 1))
    expected *= 20 / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(bars.idf_rows(levels, fitted).toarray(), expected)


def test_scales_look_at_no_other_cells_than_those_they_are_fitted_on() -> None:
    z = np.random.default_rng(0).normal(size=(50, 8))
    fitted, other = np.arange(20), z.copy()
    other[20:] += 100
    for scale in bars.SCALES.values():
        np.testing.assert_allclose(scale(z, fitted)[:20], scale(other, fitted)[:20])
    np.testing.assert_allclose(np.linalg.norm(bars.unit_rows(z, fitted), axis=1), 1)
    np.testing.assert_allclose(bars.standard_rows(z, fitted)[:20].var(axis=0), 1 / 8)


def test_every_cell_is_held_out_once_and_folds_hold_every_type_alike() -> None:
    obs = pd.DataFrame({"cell_type": np.repeat(["a", "b"], [60, 40])}, index=[f"c{i}" for i in range(100)])
    table_of_folds = sets._cells(obs, sets.SETS["cerebellum"])
    counts = pd.crosstab(obs["cell_type"].to_numpy(), table_of_folds["fold"])
    assert (counts.loc["a"] == 12).all()
    assert (counts.loc["b"] == 8).all()


def test_a_draw_keeps_ten_labels_of_each_type_and_all_that_test() -> None:
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "cell_type": rng.choice(["a", "b", "c"], 300),
            "coarse_label": "x",
            "donor": rng.choice(["D5", "D6"], 300),
        },
        index=[f"c{i}" for i in range(300)],
    )
    drawn = sets._cells(obs, sets.SETS["granja"])
    draws = [drawn[sets.few_labels("cell_type", draw)].to_numpy() for draw in range(sets.DRAWS)]
    trains = obs["donor"].to_numpy() == "D6"
    for types in draws:
        assert pd.Series(types[trains]).value_counts().drop("").to_dict() == {"a": 10, "b": 10, "c": 10}
        assert (types[~trains] == obs["cell_type"].to_numpy()[~trains]).all()
        assert ((types == "") | (types == obs["cell_type"].to_numpy())).all()
    assert any((draws[0] != other).any() for other in draws[1:])


def test_no_cell_that_tests_is_pretrained_on_for_granja() -> None:
    assert sets.PRETRAINING["granja"] == "granja_d6"
    assert all(
        config["store"] in ("granja_d6", "hg19") for config in grid.configs("signal") if "store" in config
    )


def test_missing_data_are_named_and_not_fetched(tmp_path: Path) -> None:
    stores = sets.Stores(tmp_path, tmp_path / "work")
    with pytest.raises(InputError, match=r"found no cusanovich2018_cerebellum_801\.h5ad.*nothing is fetched"):
        stores.check(["cerebellum"])
    done = _run(tmp_path, tmp_path / "work", "--only", "bars")
    assert done.returncode == 2
    assert "found no" in done.stderr
    assert "Traceback" not in done.stderr


def test_rows_are_named_by_their_configuration_whatever_its_order(tmp_path: Path) -> None:
    assert rows.digest({"a": 1, "b": {"c": 2, "d": 3}}) == rows.digest({"b": {"d": 3, "c": 2}, "a": 1})
    kept = rows.Rows(tmp_path)
    kept.write({"a": 1}, {"accuracy": 0.5}, {"wall": 1.0})
    kept.write({"a": 2}, {}, {}, failed="exit 1: no")
    assert kept.read({"a": 1})["figures"] == {"accuracy": 0.5}
    assert [kept.has({"a": i}) for i in (1, 2, 3)] == [True, True, False]
    assert [kept.failed({"a": i}) for i in (1, 2, 3)] == [False, True, False]


def test_configurations_are_whole_and_no_two_rows_are_the_same() -> None:
    configs = [config for name in grid.TABLES for config in grid.configs(name)]
    assert len({rows.digest(config) for config in configs}) == len(configs)
    models = [config for config in configs if config["kind"] == "model"]
    assert all(c["pretrain"]["train"]["seed"] == c["finetune"]["train"]["seed"] == c["seed"] for c in models)
    assert json.loads(json.dumps(models)) == models


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
def test_an_interval_is_that_of_students_t(values: list[float]) -> None:
    half = table.half_width(values)
    sem = stats.sem(values)
    expected = stats.t.interval(0.95, len(values) - 1, loc=0, scale=sem)[1] if sem > 0 else 0.0
    assert half == pytest.approx(expected, abs=1e-9)
    assert math.isnan(table.half_width(values[:1]))


def _model_row(seed: int, value: str, accuracy: float, **config: Any) -> dict[str, Any]:
    whole = {
        "kind": "model",
        "set": "s",
        "select": "all",
        "labels": "t",
        "attend": "open",
        "model": "encoder",
    }
    whole |= {"trained": True, "seed": seed, **config}
    return {"config": whole, "figures": {"splits": {value: {"accuracy": accuracy, "macro_f1": accuracy / 2}}}}


def test_differences_are_paired_by_seed_and_by_what_is_held_out() -> None:
    bar = {"kind": "regression", "model": page.BAR, "set": "s", "select": "all", "labels": "t"}
    splits = {value: {"accuracy": accuracy, "macro_f1": 0.1} for value, accuracy in (("0", 0.5), ("1", 0.7))}
    found = table.models_lines(
        [
            {"config": bar, "figures": {"splits": splits}},
            _model_row(0, "0", 0.6),
            _model_row(1, "1", 0.9),
            _model_row(0, "0", 0.55, model="no encoder"),
            _model_row(0, "0", 0.99, set="another"),
        ],
        {"set": "s", "select": "all", "labels": "t"},
    )
    encoder = found["encoder of open islands, pretrained"]
    assert encoder.minus(found[page.BAR], "accuracy") == pytest.approx([0.1, 0.2])
    assert encoder.minus(found["pooled head, no encoder, pretrained"], "accuracy") == pytest.approx([0.05])
    assert found[page.BAR].minus(found[page.BAR], "accuracy") == []
    assert table.shown([0.5, 0.7]) == f"0.600 ±{stats.t.ppf(0.975, 1) * 0.1:.3f}"
    assert table.shown([0.25], signed=True) == "+0.250"


def test_figures_of_few_labels_are_of_draws() -> None:
    figures = {"accuracy": [0.5, 0.7], "macro_f1": [0.4, 0.6]}
    saved = [
        {
            "config": {"kind": "few", "model": "cell", "seed": seed, "trained": True},
            "figures": {"frozen": {"t": {k: [v + seed for v in vs] for k, vs in figures.items()}}},
        }
        for seed in (0, 1)
    ]
    line = table.signal_lines(saved, "frozen", "t")["cell"]
    assert table.over_draws(line, "accuracy") == pytest.approx([1.0, 1.2])


def test_the_page_is_what_the_saved_rows_give() -> None:
    assert page.PAGE.read_text() == page.saved_page(), "run python benchmarks/accuracy/page.py"


def test_rows_of_a_work_folder_take_the_place_of_the_saved_ones_and_others_stay(tmp_path: Path) -> None:
    few, noise = (plans.configs(name, "tiny") for name in ("few", "noise"))
    figures, seconds = {"pooled": {"accuracy": 0.5}}, {"wall": 1.0}
    kept = rows.Rows(tmp_path / "rows")
    kept.write(few[1], figures, seconds, "")
    gone = {**noise[0], "model": "of no plan any more"}
    paired = {"table": "derived", "kind": "paired", "model": "m", "set": "s", "select": "all", "labels": "t"}
    saved = [{"config": config, "figures": {}, "seconds": {}} for config in (few[0], few[1], noise[0], gone)]
    saved += [{"config": paired, "figures": {"against": other}} for other in ("a", "b")]
    found = page.merged(tmp_path, saved)
    assert [row["config"] for row in found] == [few[0], noise[0], few[1], paired, paired]
    assert found[0] is saved[0]
    assert found[2]["figures"] == figures


def _run(data: Path, work: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ACCURACY / "run.py"), "--data", str(data), "--work", str(work), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_run_gives_figures_of_every_row_and_runs_none_twice(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shipped = anndata.read_h5ad(ROOT / "annatac_scale" / "data" / "cerebellum.h5ad")
    # All cells, as the protocol fixed the splits by digest; fewer islands.
    cut = shipped[:, shipped.var_names.str.match("chr[1-6]:")]
    cut.copy().write_h5ad(data / sets.SETS["cerebellum"].file)
    done = _run(data, tmp_path / "work", "--quick", "--jobs", "2")  # the first two want the same store
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    configs = grid.quick_configs() + plans.quick_configs()
    assert told["rows"] == told["ran"] == len(configs) > 6
    assert told["failed"] == []
    assert [name for name in told["could_not_run"] if "SingleR" not in name] == []
    kept = rows.Rows(tmp_path / "work" / "rows")
    for config in configs:
        row = kept.read(config)
        if row.get("failed", "").startswith("no environment"):
            continue
        for split in row["figures"].get("splits", {}).values():
            # Five labels a type are few; the rest is easy.
            assert split["accuracy"] > (0.5 if "change" in config else 0.8)
        for scores in row["figures"].get("scores", {}).values():
            assert 0 <= scores["auroc"] <= 1
    again = _run(data, tmp_path / "work", "--quick")
    assert json.loads(again.stdout.splitlines()[-1])["ran"] == len(told["could_not_run"])


def test_the_cnn_without_an_encoder_is_the_packages_head_on_a_vector_of_each_level() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rows = sparse.random(9, 40, 0.3, "csr", rng=rng, data_rvs=lambda n: rng.integers(1, 6, n))
    rows = sparse.csr_matrix(rows.multiply(np.arange(9)[:, None] != 2))  # a cell without open islands
    rows.eliminate_zeros()
    vectors, head = torch.nn.Embedding(6, 8), CnnHead(40, 8, 3, (16, 8))
    tokens, islands, offsets = (
        torch.from_numpy(part.astype(np.int64)) for part in (rows.data, rows.indices, rows.indptr)
    )
    expected = head(vectors(tokens), tokens, islands, offsets)
    found = networks._logits(vectors, head, rows)
    torch.testing.assert_close(found, expected)
    of_both = []
    for logits in (expected, found):
        gradients = torch.autograd.grad(logits.square().sum(), [vectors.weight, *head.parameters()])
        of_both.append([gradient.clone() for gradient in gradients])
    torch.testing.assert_close(*of_both)
