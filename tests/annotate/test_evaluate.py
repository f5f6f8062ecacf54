"""Figures of a labels data set equal those of pandas and scikit-learn on the cells that the report names."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk
from small_atlas import TYPES, add_sample, draw_sample, small_model, small_space, small_store, write_split

from annatac_scale.annotate.bootstrap import bootstrap_intervals
from annatac_scale.annotate.evaluate import evaluate
from annatac_scale.annotate.evaluation_report import EvaluationReport
from annatac_scale.annotate.labels import MANIFEST
from annatac_scale.annotate.metrics import evaluate_labels
from annatac_scale.annotate.predict import predict
from annatac_scale.errors import InputError
from annatac_scale.model.labels import NOVEL
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import create_store, replace_obs

SPLITS = ["train", "train", "val", "calib", "test"]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with atlas.zarr (two samples that share their barcodes), run/model, run/split.parquet and labels."""
    path = tmp_path_factory.mktemp("evaluate")
    create_store(path / "atlas.zarr", small_space(), "insertion")
    rng = np.random.default_rng(0)
    rows = []
    for seed, (name, n) in enumerate({"a": 200, "b": 60, "none": 0}.items()):
        barcodes = [f"c{i}" for i in range(n)]
        truth = rng.choice([*TYPES, "glia", ""], n, p=[0.4, 0.2, 0.2, 0.15, 0.05]).astype(object)
        number = rng.integers(0, 3, n).astype(float)
        number[::7] = np.nan
        obs = pd.DataFrame({"truth": truth, "number": number, "blank": None}, index=barcodes)
        obs.loc[truth == "", "truth"] = None
        add_sample(path / "atlas.zarr", name, draw_sample(n, seed), obs)
        rows += [(name, barcode, SPLITS[i % 5]) for i, barcode in enumerate(barcodes) if i < 150]
    store = IslandStore.open(path / "atlas.zarr")
    small_model(path / "run/model")
    write_split(path / "run/split.parquet", rows, {n: s.x_sha256 for n, s in store.samples.items()})
    predict(store, path / "run/model", path / "labels")
    return path


def joined(atlas: Path) -> pd.DataFrame:
    """Labels and truth side by side, by plain pandas."""
    obs = IslandStore.open(atlas / "atlas.zarr").obs()
    return pd.read_parquet(atlas / "labels").merge(obs, on=["sample", "barcode"], validate="1:1")


def assert_figures(report: EvaluationReport, rows: pd.DataFrame) -> None:
    known = rows[rows["truth"].notna()]
    truth, label, best = known["truth"], known["label"], known["best"]
    types = sorted(set(truth))
    found = report.evaluation
    assert found.n_cells == len(known)
    assert found.n_without_truth == len(rows) - len(known)
    assert found.accuracy == pytest.approx(sk.accuracy_score(truth, label))
    assert found.macro_f1 == pytest.approx(
        sk.f1_score(truth, label, labels=types, average="macro", zero_division=0)
    )
    assert report.best.accuracy == pytest.approx(sk.accuracy_score(truth, best))
    assert report.best.macro_f1 == pytest.approx(
        sk.f1_score(truth, best, labels=types, average="macro", zero_division=0)
    )
    assert found.kappa == pytest.approx(sk.cohen_kappa_score(truth, label))
    crossed = pd.crosstab(truth, label)
    for true_type in types:
        for name in crossed.columns:
            assert found.confusion.loc[true_type, name] == crossed.loc[true_type, name]
    assert report.share_novel == pytest.approx((known["label"] == NOVEL).mean())
    glia = int((truth == "glia").sum())
    assert report.unknown_types == ({"glia": glia} if glia else {})


def calibration_error(rows: pd.DataFrame) -> float:
    """Over 15 bins of the cells whose type the model knows, by plain loops."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row in rows[rows["truth"].isin(TYPES)].itertuples():
        bins.setdefault(int(np.ceil(row.confidence * 15)), []).append((row.confidence, row.best == row.truth))
    n = sum(map(len, bins.values()))
    return sum(abs(sum(c - right for c, right in members)) for members in bins.values()) / n


def test_held_out_cells_alone_are_evaluated_unless_asked_otherwise(atlas: Path) -> None:
    table = joined(atlas)
    report = evaluate(atlas / "labels", atlas / "atlas.zarr", "truth")
    test = table[table["split"] == "test"]
    assert_figures(report, test)
    assert report.calibration_error == pytest.approx(calibration_error(test), rel=1e-5)
    assert report.n_by_split == {"train": 84, "val": 42, "calib": 42, "test": 42, "none": 50}
    assert report.notes[0] == "held-out test cells: 42 of 260"
    assert report.n_trained_on == 0
    assert not any("fine-tuning" in note for note in report.notes)


def test_all_cells_are_evaluated_with_a_warning_that_some_were_trained_on(atlas: Path) -> None:
    table = joined(atlas)
    report = evaluate(str(atlas / "labels"), IslandStore.open(atlas / "atlas.zarr"), "truth", cells="all")
    assert_figures(report, table)
    assert report.calibration_error == pytest.approx(calibration_error(table), rel=1e-5)
    assert report.notes[0] == "all 260 cells"
    known = table[table["truth"].notna()]
    n = known["split"].isin(["train", "val", "calib"]).sum()
    assert report.n_trained_on == n < 168
    assert report.notes[1] == (
        f"{n} of the {len(known)} evaluated cells were used in fine-tuning: the figures are better than on new cells"
    )


def test_types_that_the_model_does_not_know_and_cells_without_truth_are_counted(atlas: Path) -> None:
    table = joined(atlas)
    report = evaluate(atlas / "labels", atlas / "atlas.zarr", "truth", cells="all")
    glia, missing = int((table["truth"] == "glia").sum()), int(table["truth"].isna().sum())
    assert f"{missing} cells without a truth are left out" in report.notes
    assert report.notes[-1].endswith(f"does not know, so that no best type can be right: glia ({glia} cells)")


def squeezed(lines: list[str]) -> list[str]:
    """Lines with one blank where there are many."""
    return [" ".join(line.split()) for line in lines]


def test_novelty_and_intervals_are_those_of_the_cells_alone(atlas: Path) -> None:
    report = evaluate(atlas / "labels", atlas / "atlas.zarr", "truth", cells="all")
    known = joined(atlas).dropna(subset=["truth"])
    novel = ~known["truth"].isin(TYPES)
    expected = sk.roc_auc_score(novel, 1 - known["confidence"])
    assert report.novelty.auroc == pytest.approx(expected)
    assert (report.novelty.n_novel, report.novelty.n_known) == (novel.sum(), (~novel).sum())
    assert report.coverage is None
    assert report.intervals == bootstrap_intervals(evaluate_labels(known["truth"], known["label"]))


def test_prediction_sets_and_novelty_scores_are_judged_where_predict_wrote_them(
    atlas: Path, tmp_path: Path
) -> None:
    shutil.copytree(atlas / "labels", tmp_path / "labels")
    rng = np.random.default_rng(0)
    for file in (tmp_path / "labels").glob("*.parquet"):
        table = pq.read_table(file)
        sets = [[name for name in TYPES if rng.random() < 0.7] for _ in range(len(table))]
        for name, values in (("set", sets), ("novelty_score", rng.normal(size=len(table)))):
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
        pq.write_table(table, file)
    report = evaluate(tmp_path / "labels", atlas / "atlas.zarr", "truth", cells="all")
    obs = IslandStore.open(atlas / "atlas.zarr").obs()
    cells = pd.read_parquet(tmp_path / "labels").merge(obs, on=["sample", "barcode"]).dropna(subset=["truth"])
    known = cells[cells["truth"].isin(TYPES)]
    hits = [truth in found for truth, found in zip(known["truth"], known["set"], strict=True)]
    assert report.coverage.coverage == np.mean(hits)
    assert report.coverage.mean_size == pytest.approx(known["set"].map(len).mean())
    assert report.coverage.n_empty == (known["set"].map(len) == 0).sum()
    novel = ~cells["truth"].isin(TYPES)
    assert report.novelty.auroc == pytest.approx(sk.roc_auc_score(novel, cells["novelty_score"]))
    low, high = report.coverage.interval
    expected = f"sets with the truth {np.mean(hits):.4f} [{low:.4f}, {high:.4f}], "
    assert any(line.startswith(expected) for line in squeezed(report.text()))
    json.dumps(report.to_dict(), allow_nan=False)


def test_another_column_of_predict_can_be_the_labels(atlas: Path) -> None:
    report = evaluate(atlas / "labels", atlas / "atlas.zarr", "truth", labels_column="best")
    assert report.evaluation.to_dict() == report.best.to_dict()
    assert report.n_novel == 0
    with pytest.raises(
        InputError, match="found no column 'cell_type'; expected --labels-column to be one of sample"
    ):
        evaluate(atlas / "labels", atlas / "atlas.zarr", "truth", labels_column="cell_type")


def test_the_report_is_json_and_text(atlas: Path) -> None:
    report = evaluate(atlas / "labels", atlas / "atlas.zarr", "truth")
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["accuracy"] == report.evaluation.accuracy
    assert values["n_by_split"] == report.n_by_split
    assert values["cells"] == "test"
    assert values["best_accuracy"] == report.best.accuracy
    assert values["best_macro_f1"] == report.best.macro_f1
    assert values["notes"] == report.notes
    assert values["confusion"]["truth"] == report.evaluation.confusion.index.tolist()
    lines = report.text()
    assert lines[: len(report.notes)] == report.notes
    low, high = report.intervals["accuracy"]
    assert values["intervals"]["accuracy"] == [low, high]
    assert f"accuracy {report.evaluation.accuracy:.4f} [{low:.4f}, {high:.4f}]" in squeezed(lines)
    for name, figure in (("accuracy", report.best.accuracy), ("macro F1", report.best.macro_f1)):
        low, high = report.best_intervals[name.replace(" ", "_").lower()]
        assert f"{name} of best {figure:.4f} [{low:.4f}, {high:.4f}]" in squeezed(lines)
    band = report.calibration.band
    expected = f"perfect calibration: [{band.low:.4f}, {band.high:.4f}]"
    assert f"calibration error {report.calibration_error:.4f} {expected}" in squeezed(lines)
    assert values["calibration"]["band"] == list(band)
    for name, values in report.evaluation.confusion.iterrows():
        assert any(line.split() == [*str(name).split(), *map(str, values)] for line in lines)
    for row in report.evaluation.per_type.itertuples():
        figures = [str(row.n), *(f"{value:.4f}" for value in (row.precision, row.recall, row.f1))]
        assert any(line.split() == [*row.cell_type.split(), *figures] for line in lines)


@pytest.mark.parametrize("threshold", [0.99, 0.5, 0])
def test_a_note_says_so_where_most_cells_are_novel_and_best_does_not_depend_on_it(
    atlas: Path, tmp_path: Path, threshold: float
) -> None:
    predict(atlas / "atlas.zarr", atlas / "run/model", tmp_path / "labels", novel_threshold=threshold)
    report = evaluate(tmp_path / "labels", atlas / "atlas.zarr", "truth")
    table = joined(atlas)
    known = table[(table["split"] == "test") & table["truth"].notna()]
    n_novel = int((known["confidence"] < threshold).sum())
    notes = [note for note in report.notes if "novel threshold" in note]
    expected = (
        f"{n_novel} of {len(known)} cells are below the novel threshold {threshold}; see best, or predict with "
        "--novel-threshold 0"
    )
    assert notes == ([expected] if n_novel > len(known) / 2 else [])
    assert bool(notes) == (threshold == 0.99)
    assert report.best.accuracy == pytest.approx((known["best"] == known["truth"]).mean())


def test_cells_of_low_depth_are_counted_noted_and_errors(atlas: Path, tmp_path: Path) -> None:
    predict(atlas / "atlas.zarr", atlas / "run/model", tmp_path / "labels", min_open=5, novel_threshold=0)
    report = evaluate(tmp_path / "labels", atlas / "atlas.zarr", "truth")
    table = joined(atlas)
    known = table[(table["split"] == "test") & table["truth"].notna()]
    low = known["n_open"] < 5
    assert report.n_low_depth == low.sum() > 0
    assert report.evaluation.accuracy == pytest.approx(((known["best"] == known["truth"]) & ~low).mean())
    assert report.n_novel == 0
    note = (
        f"{low.sum()} of {len(known)} cells have fewer than 5 open islands and are named Unassigned_low_depth"
    )
    assert any(line.startswith(note) for line in report.notes)
    assert report.to_dict()["n_low_depth"] == low.sum()


def test_truths_of_numbers_are_compared_as_text(atlas: Path, tmp_path: Path) -> None:
    small_model(tmp_path / "run/model", types=("0", "1", "9"))
    predict(atlas / "atlas.zarr", tmp_path / "run/model", tmp_path / "labels", novel_threshold=0)
    report = evaluate(tmp_path / "labels", atlas / "atlas.zarr", "number", cells="all")
    table = pd.read_parquet(tmp_path / "labels").merge(
        IslandStore.open(atlas / "atlas.zarr").obs(["number"]), on=["sample", "barcode"]
    )
    known = table[table["number"].notna()]
    right = [str(int(number)) == best for number, best in zip(known["number"], known["best"], strict=True)]
    assert report.evaluation.accuracy == pytest.approx(np.mean(right))
    assert list(report.unknown_types) == ["2"]


def test_spaces_around_a_type_do_not_make_it_another(tmp_path: Path) -> None:
    store = small_store(tmp_path / "atlas.zarr", {"a": draw_sample(50, 1)})
    small_model(tmp_path / "model")
    predict(store, tmp_path / "model", tmp_path / "labels", novel_threshold=0)
    best = pd.read_parquet(tmp_path / "labels")["best"]
    obs = store.samples["a"].obs()
    replace_obs(store.path, "a", obs.assign(truth=[f" {name}  " for name in best]))
    report = evaluate(tmp_path / "labels", store.path, "truth", cells="all")
    assert report.evaluation.accuracy == 1
    assert report.unknown_types == {}


def test_without_a_held_out_cell_all_must_be_asked_for(atlas: Path, tmp_path: Path) -> None:
    small_model(tmp_path / "model")
    predict(atlas / "atlas.zarr", tmp_path / "model", tmp_path / "labels")
    with pytest.raises(InputError, match=r"found no held-out cell among 260, .* use --cells all"):
        evaluate(tmp_path / "labels", atlas / "atlas.zarr", "truth")
    report = evaluate(tmp_path / "labels", atlas / "atlas.zarr", "truth", cells="all")
    assert report.n_by_split == {"none": 260}
    assert report.notes[0] == "all 260 cells"
    assert not any("fine-tuning" in note for note in report.notes)


def test_of_a_data_set_that_is_not_complete_the_parts_that_are_there_are_evaluated(
    atlas: Path, tmp_path: Path
) -> None:
    store, whole = atlas / "atlas.zarr", evaluate(atlas / "labels", atlas / "atlas.zarr", "truth")
    shutil.copytree(atlas / "labels", tmp_path / "labels")
    manifest = tmp_path / "labels" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    report = evaluate(tmp_path / "labels", store, "truth")
    assert report.n_missing == 0
    assert {**report.to_dict(), "labels": ""} == {**whole.to_dict(), "labels": ""}

    (tmp_path / "labels/a-00000.parquet").unlink()
    table = joined(atlas)
    own = table[table["sample"] == "b"]
    report = evaluate(tmp_path / "labels", store, "truth")
    assert_figures(report, own[own["split"] == "test"])
    assert report.n_missing == report.to_dict()["n_missing"] == 200
    assert report.left_out.n_without_label == 0
    note = f"200 cells of {tmp_path / 'labels'} are not predicted yet, and left out"
    assert note in report.notes
    assert note in report.text()
    everything = evaluate(tmp_path / "labels", store, "truth", cells="all")
    assert_figures(everything, own)
    assert everything.left_out.n_without_label == table[table["sample"] == "a"]["truth"].notna().sum()
    beside = evaluate(atlas / "labels", store, "truth", against=tmp_path / "labels")
    assert (beside.n_missing, beside.against.n_missing) == (0, 200)
    assert beside.evaluation.to_dict() == report.evaluation.to_dict()
    assert note in beside.notes


def test_a_data_set_without_a_part_and_no_data_set_are_refused(atlas: Path, tmp_path: Path) -> None:
    shutil.copytree(atlas / "labels", tmp_path / "labels", ignore=shutil.ignore_patterns("*.parquet"))
    with pytest.raises(InputError, match=r"found none of its 3 parts, .*annatac predict"):
        evaluate(tmp_path / "labels", atlas / "atlas.zarr", "truth")
    with pytest.raises(InputError, match=r"found no _manifest\.json, expected a folder of labels"):
        evaluate(tmp_path / "nowhere", atlas / "atlas.zarr", "truth")


def test_damage_inside_a_part_is_noticed(atlas: Path, tmp_path: Path) -> None:
    predict(atlas / "atlas.zarr", atlas / "run/model", tmp_path / "labels")
    part = tmp_path / "labels/a-00000.parquet"
    data = bytearray(part.read_bytes())
    data[data.index(b"PAR1") + 200] ^= 1
    part.write_bytes(data)
    with pytest.raises(InputError, match=r"a-00000\.parquet: cannot be read"):
        evaluate(tmp_path / "labels", atlas / "atlas.zarr", "truth")


def test_labels_of_another_store_are_refused(atlas: Path, tmp_path: Path) -> None:
    other = small_store(tmp_path / "other.zarr", {"a": draw_sample(3, 1)})
    obs = other.samples["a"].obs().assign(truth="neuron")
    replace_obs(other.path, "a", obs)
    with pytest.raises(
        InputError, match=r"found 42 of 42 cells that .*other\.zarr does not have, the first 'c4'"
    ):
        evaluate(atlas / "labels", other.path, "truth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truth": "type"}, "no obs column 'type'"),
        ({"truth": "blank"}, "truth: found no label in any of 42 cells"),
        ({"truth": "truth", "cells": "train"}, "--cells: found 'train', expected test or all"),
    ],
)
def test_questions_without_an_answer_are_refused(atlas: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(atlas / "labels", atlas / "atlas.zarr", **options)
