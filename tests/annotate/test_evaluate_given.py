"""Labels and truths of any tool: joined by cell, counted where they do not meet, refused where it is not clear."""

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk
from scipy import sparse
from scipy.stats import binomtest
from small_atlas import TYPES, add_sample, draw_sample, small_model, small_space, write_split

from annatac_scale.annotate.evaluate import evaluate
from annatac_scale.annotate.evaluation_report import LeftOut
from annatac_scale.annotate.given_labels import CellLabels, rows_in
from annatac_scale.annotate.predict import predict
from annatac_scale.errors import InputError
from annatac_scale.model.labels import LOW_DEPTH
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import create_store

SIZES = {"a": 80, "b": 40}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with atlas.zarr of two samples, whose first 20 barcodes are the same, a model, its split and labels."""
    path = tmp_path_factory.mktemp("given")
    create_store(path / "atlas.zarr", small_space(), "insertion")
    rng, rows = np.random.default_rng(0), []
    for seed, (name, n) in enumerate(SIZES.items()):
        barcodes = [f"c{i}" if i < 20 else f"{name}{i}" for i in range(n)]
        truth = rng.choice(TYPES, n).astype(object)
        truth[::9] = None
        other = np.where(rng.random(n) < 0.7, truth, rng.choice(TYPES, n))
        obs = pd.DataFrame({"truth": truth, "other": other}, index=barcodes)
        add_sample(path / "atlas.zarr", name, draw_sample(n, seed), obs)
        rows += [(name, barcode, ["train", "val", "test"][i % 3]) for i, barcode in enumerate(barcodes)]
    store = IslandStore.open(path / "atlas.zarr")
    small_model(path / "run/model")
    write_split(path / "run/split.parquet", rows, {n: s.x_sha256 for n, s in store.samples.items()})
    predict(store, path / "run/model", path / "labels", novel_threshold=0)
    return path


def cells_of(atlas: Path) -> pd.DataFrame:
    """sample, barcode, truth, other of every cell; label: what some other tool would say."""
    obs = IslandStore.open(atlas / "atlas.zarr").obs(["truth", "other"])
    rng = np.random.default_rng(5)
    right = rng.random(len(obs)) < 0.8
    guessed = rng.choice(TYPES, len(obs))
    return obs.assign(label=np.where(right & obs["truth"].notna(), obs["truth"], guessed))


def accuracy(cells: pd.DataFrame, label: str = "label") -> float:
    known = cells.dropna(subset=["truth"])
    return sk.accuracy_score(known["truth"], known[label])


def held_out_sample(atlas: Path, folder: Path, sample: str) -> Path:
    """A copy of the labels that says that fine-tuning held out all of one sample, and trained on all others."""
    shutil.copytree(atlas / "labels", folder)
    for file in folder.glob("*.parquet"):
        table = pq.read_table(file)
        split = "test" if file.name.startswith(f"{sample}-") else "train"
        place = table.schema.get_field_index("split")
        values = pa.array([split] * len(table), table.schema.field("split").type)
        pq.write_table(table.set_column(place, "split", values), file)
    return folder


def write_h5ad(path: Path, cells: pd.DataFrame) -> Path:
    obs = cells.set_index("barcode")
    anndata.AnnData(sparse.csr_matrix(np.ones((len(obs), 2))), obs=obs).write_h5ad(path)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_labels_in_a_file_are_joined_to_the_store_by_sample_and_barcode(
    atlas: Path, tmp_path: Path, kind: str
) -> None:
    cells, file = cells_of(atlas), tmp_path / f"tool.{kind}"
    shuffled = cells.sample(frac=1, random_state=0)[["sample", "barcode", "label"]]
    _ = shuffled.to_csv(file, index=False) if kind == "csv" else shuffled.to_parquet(file)
    report = evaluate(file, atlas / "atlas.zarr", "truth", labels_column="label")
    assert report.cells == "all"
    assert report.evaluation.accuracy == pytest.approx(accuracy(cells))
    assert report.evaluation.n_without_truth == cells["truth"].isna().sum()
    assert report.left_out == LeftOut()
    assert (report.best, report.calibration, report.model) == (None, None, "")
    assert report.notes[0] == "all 120 cells"
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["calibration_error"] is values["best_accuracy"] is values["novelty"] is None
    assert not any("calibration" in line or "of best" in line for line in report.text())


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "h5ad"])
def test_the_truth_can_be_a_column_of_a_file(atlas: Path, tmp_path: Path, kind: str) -> None:
    cells = cells_of(atlas)
    one = cells[cells["sample"] == "b"][["barcode", "truth", "label"]].reset_index(drop=True)
    file = tmp_path / f"truth.{kind}"
    if kind == "h5ad":
        write_h5ad(file, one)
    elif kind == "parquet":
        one.to_parquet(file)
    else:
        one.to_csv(file, sep="," if kind == "csv" else "\t", index=False)
    labels = tmp_path / "labels.csv"
    one[["barcode", "label"]].to_csv(labels, index=False)
    report = evaluate(labels, None, "truth", labels_column="label", truth_file=file)
    assert report.evaluation.accuracy == pytest.approx(accuracy(one))
    assert report.to_dict()["truth_file"] == str(file)


def test_a_truth_in_a_file_goes_through_the_label_map_too_and_for_both_labels(
    atlas: Path, tmp_path: Path
) -> None:
    cells, mapping = cells_of(atlas), tmp_path / "map.tsv"
    mapping.write_text(f"from\tto\n{TYPES[0]}\t{TYPES[1]}\n{TYPES[2]}\t\n")
    for name in ("truth", "tool"):
        cells.rename(columns={"label": "tool"})[["sample", "barcode", name]].to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    report = evaluate(
        tmp_path / "tool.csv",
        None,
        "truth",
        labels_column="tool",
        truth_file=tmp_path / "truth.csv",
        against=atlas / "atlas.zarr",
        against_column="other",
        label_map=mapping,
    )
    mapped = cells.dropna(subset=["other"]).assign(
        truth=lambda rows: rows["truth"].replace({TYPES[0]: TYPES[1], TYPES[2]: None})
    )
    assert report.evaluation.n_cells == mapped["truth"].notna().sum()
    assert report.evaluation.accuracy == pytest.approx(accuracy(mapped))
    assert report.against.evaluation.accuracy == pytest.approx(accuracy(mapped, "other"))
    assert (report.rule, report.lineage, report.unused_labels) == (None, None, ())


def test_an_obs_column_of_the_store_can_be_the_labels(atlas: Path) -> None:
    report = evaluate(atlas / "atlas.zarr", atlas / "atlas.zarr", "truth", labels_column="other")
    cells = cells_of(atlas).dropna(subset=["truth"])
    assert report.evaluation.n_cells == len(cells)
    assert report.evaluation.accuracy == pytest.approx(accuracy(cells, "other"))


def test_cells_that_one_side_does_not_have_are_counted_and_said(atlas: Path, tmp_path: Path) -> None:
    cells, file = cells_of(atlas), tmp_path / "tool.tsv"
    known = np.flatnonzero(cells["truth"].notna())
    some = cells.drop(index=known[:7])[["sample", "barcode", "label"]]
    some.loc[known[10:13], "label"] = ""
    strangers = pd.DataFrame({"sample": "a", "barcode": ["x1", "x2"], "label": "neuron"})
    pd.concat([some, strangers]).to_csv(file, sep="\t", index=False)
    report = evaluate(file, atlas / "atlas.zarr", "truth", labels_column="label")
    assert report.left_out == LeftOut(n_not_in_truth=2, n_without_label=10)
    assert report.evaluation.n_cells == len(known) - 10
    assert f"2 cells of {file} are not in the store, and left out" in report.notes
    assert f"10 cells with a truth have no label in {file}, and are left out" in report.notes
    kept = cells.drop(index=[*known[:7], *known[10:13]])
    assert report.evaluation.accuracy == pytest.approx(accuracy(kept))


def test_barcodes_of_two_samples_without_a_sample_are_refused_by_name(atlas: Path, tmp_path: Path) -> None:
    cells, file = cells_of(atlas), tmp_path / "tool.csv"
    cells[["barcode", "label"]].drop_duplicates("barcode").to_csv(file, index=False)
    message = (
        r"atlas\.zarr: found 20 cells more than once, as 'c0' of sample 'a' and 'c0' of sample 'b', which "
        r".*tool\.csv has too; expected each cell once; add a column sample to .*tool\.csv"
    )
    with pytest.raises(InputError, match=message):
        evaluate(file, atlas / "atlas.zarr", "truth", labels_column="label")
    # Those that are in one sample alone are clear.
    apart = cells[~cells["barcode"].str.startswith("c")]
    apart[["barcode", "label"]].to_csv(file, index=False)
    report = evaluate(file, atlas / "atlas.zarr", "truth", labels_column="label")
    assert report.evaluation.accuracy == pytest.approx(accuracy(apart))


@pytest.mark.parametrize("side", ["labels", "truth"])
def test_a_barcode_of_two_samples_is_refused_also_where_one_sample_alone_is_held_out(
    atlas: Path, tmp_path: Path, side: str
) -> None:
    labels, file = held_out_sample(atlas, tmp_path / "labels", "a"), tmp_path / "tool.csv"
    cells = cells_of(atlas)
    cells[cells["sample"] == "b"][["barcode", "label", "truth"]].to_csv(file, index=False)
    options = {"store": None, "truth_file": file}
    if side == "labels":
        options = {"store": atlas / "atlas.zarr", "against": file, "against_column": "label"}
    with pytest.raises(InputError, match="found 20 cells more than once, as 'c0' of sample 'a' and 'c0' of"):
        evaluate(labels, truth="truth", **options)


def test_a_barcode_of_two_samples_is_refused_also_where_the_other_labels_have_one_of_them(
    atlas: Path, tmp_path: Path
) -> None:
    cells, (file, other) = cells_of(atlas), (tmp_path / "tool.csv", tmp_path / "other.csv")
    cells[cells["sample"] == "b"][["barcode", "label"]].to_csv(other, index=False)
    cells[cells["sample"] == "a"][["sample", "barcode", "label"]].to_csv(file, index=False)
    with pytest.raises(InputError, match=r"found 20 cells more than once, .* which .*other\.csv has too"):
        evaluate(
            file, atlas / "atlas.zarr", "truth", labels_column="label", against=other, against_column="label"
        )


def test_labels_without_samples_do_not_join_the_cells_of_two_samples(tmp_path: Path) -> None:
    for name, sample in (("here", None), ("there", ["a", "a"]), ("truth", ["b", "a"])):
        table = pd.DataFrame({"barcode": ["c1", "c2"], "type": ["T", "B"]})
        table = table if sample is None else table.assign(sample=sample)
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    report = evaluate(
        tmp_path / "here.csv", None, "type", truth_file=tmp_path / "truth.csv", labels_column="type",
        against=tmp_path / "there.csv", against_column="type",
    )  # fmt: skip
    assert report.evaluation.n_cells == 1
    assert report.left_out.n_not_in_truth == 1


def test_a_row_twice_is_refused_by_name(atlas: Path, tmp_path: Path) -> None:
    cells, file = cells_of(atlas), tmp_path / "tool.csv"
    pd.concat([cells, cells.iloc[[30]]])[["sample", "barcode", "label"]].to_csv(file, index=False)
    with pytest.raises(
        InputError,
        match=r"tool\.csv: found a cell twice, as 'a30' of sample 'a' and 'a30' of .* remove all rows but",
    ):
        evaluate(file, atlas / "atlas.zarr", "truth", labels_column="label")


def test_tables_that_do_not_meet_are_shown_side_by_side(atlas: Path, tmp_path: Path) -> None:
    file = tmp_path / "tool.csv"
    pd.DataFrame({"barcode": ["c1-1", "c2-1"], "label": "neuron"}).to_csv(file, index=False)
    with pytest.raises(
        InputError, match=r"found no labelled cell that .*: 'c1-1', 'c2-1' here, 'c0' of sample 'a'"
    ):
        evaluate(file, atlas / "atlas.zarr", "truth", labels_column="label")


def test_other_labels_beside_those_of_predict_are_judged_on_the_held_out_cells(
    atlas: Path, tmp_path: Path
) -> None:
    cells, file = cells_of(atlas), tmp_path / "tool.csv"
    cells[["sample", "barcode", "label"]].to_csv(file, index=False)
    table = pd.read_parquet(atlas / "labels").merge(
        cells[["sample", "barcode", "truth", "label"]], on=["sample", "barcode"], suffixes=("", "_tool")
    )
    test = table[(table["split"] == "test") & table["truth"].notna()]
    here = evaluate(atlas / "labels", atlas / "atlas.zarr", "truth", against=file, against_column="label")
    there = evaluate(file, atlas / "atlas.zarr", "truth", labels_column="label", against=atlas / "labels")
    for report in (here, there):
        assert (report.cells, report.evaluation.n_cells) == ("test", len(test))
        assert report.left_out == LeftOut()
    assert here.evaluation.accuracy == there.against.evaluation.accuracy == pytest.approx(accuracy(test))
    assert there.evaluation.accuracy == pytest.approx(accuracy(test, "label_tool"))
    one, two = test["label"] == test["truth"], test["label_tool"] == test["truth"]
    paired = here.against.test
    assert (paired.n_only_first, paired.n_only_second) == ((one & ~two).sum(), (two & ~one).sum())
    assert paired.p_mcnemar == pytest.approx(binomtest((one & ~two).sum(), (one ^ two).sum()).pvalue)
    assert here.best is not None
    assert there.best is None
    lines = here.text()
    (place,) = (i for i, line in enumerate(lines) if line.startswith("right here alone"))
    assert lines[place + 1] == "Intervals and p are of other cells of these donors, not of other donors."
    (note,) = (line for line in here.to_dict()["notes"] if "take cells as independent" in line)
    assert note.startswith(f"the tests against {file} take")
    alone = evaluate(atlas / "labels", atlas / "atlas.zarr", "truth")
    assert not any("independent" in line for line in [*alone.text(), *alone.notes])
    assert json.loads(json.dumps(here.to_dict(), allow_nan=False))["against"]["test"]["n_cells"] == len(test)


def test_cells_that_either_of_two_models_trained_on_are_counted_where_they_are_judged(
    atlas: Path, tmp_path: Path
) -> None:
    first = held_out_sample(atlas, tmp_path / "first", "a")
    second = held_out_sample(atlas, tmp_path / "second", "none")
    cells = cells_of(atlas).dropna(subset=["truth"])
    file = tmp_path / "some.csv"
    some = cells.iloc[10:90]
    some.to_csv(file, index=False)
    n_b = (some["sample"] == "b").sum()
    assert 0 < n_b < len(some)
    for labels, against, n in ((first, file, n_b), (file, first, n_b), (first, second, len(cells))):
        columns = {"labels_column" if labels == file else "against_column": "label"}
        report = evaluate(labels, atlas / "atlas.zarr", "truth", cells="all", against=against, **columns)
        assert report.n_trained_on == n
    alone = evaluate(first, None, "truth", truth_file=file, cells="all")
    assert alone.n_trained_on == n_b
    assert f"{n_b} of the 80 evaluated cells were used in fine-tuning" in alone.notes[1]


def test_of_two_files_the_cells_that_both_have_are_judged(atlas: Path, tmp_path: Path) -> None:
    cells = cells_of(atlas)
    cells.iloc[10:].to_parquet(tmp_path / "one.parquet")
    cells.iloc[:-5].to_parquet(tmp_path / "two.parquet")
    report = evaluate(
        tmp_path / "one.parquet", atlas / "atlas.zarr", "truth", labels_column="label",
        against=tmp_path / "two.parquet", against_column="other",
    )  # fmt: skip
    has_other = cells["other"].notna()
    common = cells.iloc[10:-5][has_other.iloc[10:-5]]
    n_other = has_other.iloc[:-5].sum()
    assert report.left_out == LeftOut(n_not_in_other=110 - len(common), n_only_in_other=n_other - len(common))
    assert report.evaluation.accuracy == pytest.approx(accuracy(common))
    assert report.against.evaluation.accuracy == pytest.approx(accuracy(common, "other"))


def test_of_two_sets_of_labels_each_cell_that_is_left_out_is_counted_once(
    atlas: Path, tmp_path: Path
) -> None:
    cells = cells_of(atlas)
    known = np.flatnonzero(cells["truth"].notna())
    here, there = cells.assign(other="neuron"), cells.assign(other="neuron")
    here.loc[known[:9], "label"] = ""  # of these, three have no label there either
    there.loc[known[6:13], "other"] = None
    here.drop(index=known[20:23]).to_csv(tmp_path / "here.csv", index=False)
    there.drop(index=known[22:27]).to_csv(tmp_path / "there.csv", index=False)
    report = evaluate(
        tmp_path / "here.csv", atlas / "atlas.zarr", "truth", labels_column="label",
        against=tmp_path / "there.csv", against_column="other",
    )  # fmt: skip
    left = report.left_out
    assert left == LeftOut(n_without_label=3 + 1, n_not_in_other=4 + 4, n_only_in_other=6 + 2)
    n_left_out = left.n_without_label + left.n_not_in_other + left.n_only_in_other
    assert report.evaluation.n_cells == len(known) - n_left_out
    of_both = f"{tmp_path / 'here.csv'} or {tmp_path / 'there.csv'}"
    assert f"4 cells with a truth have no label in {of_both}, and are left out" in report.notes


@pytest.mark.parametrize("turned", [False, True])
def test_held_out_cells_that_other_labels_leave_blank_are_counted(
    atlas: Path, tmp_path: Path, turned: bool
) -> None:
    cells, file = cells_of(atlas), tmp_path / "tool.csv"
    table = pd.read_parquet(atlas / "labels").merge(cells, on=["sample", "barcode"], suffixes=("", "_tool"))
    test = table[(table["split"] == "test") & table["truth"].notna()]
    blank = pd.MultiIndex.from_frame(test[["sample", "barcode"]].iloc[:5])
    names = pd.MultiIndex.from_frame(cells[["sample", "barcode"]])
    cells.assign(label=cells["label"].where(~names.isin(blank), "")).to_csv(file, index=False)
    options = {"labels_column": "label", "against": atlas / "labels"} if turned else {}
    options = options or {"against": file, "against_column": "label"}
    report = evaluate(file if turned else atlas / "labels", atlas / "atlas.zarr", "truth", **options)
    assert report.left_out == LeftOut(**{"n_only_in_other" if turned else "n_not_in_other": 5})
    assert report.evaluation.n_cells == len(test) - 5


def test_cells_that_are_left_unassigned_are_counted_and_the_others_judged_apart(
    atlas: Path, tmp_path: Path
) -> None:
    cells, file = cells_of(atlas), tmp_path / "tool.csv"
    unassigned = np.arange(len(cells)) % 4 == 0
    cells.loc[unassigned, "label"] = LOW_DEPTH
    cells.to_csv(file, index=False)
    report = evaluate(file, atlas / "atlas.zarr", "truth", labels_column="label")
    known = cells["truth"].notna().to_numpy()
    assert report.n_low_depth == (unassigned & known).sum()
    assert report.evaluation.accuracy == pytest.approx(accuracy(cells))
    assert report.assigned.accuracy == pytest.approx(accuracy(cells[~unassigned]))
    assert report.assigned.n_cells == (~unassigned & known).sum()
    lines = [" ".join(line.split()) for line in report.text()]
    share = report.n_low_depth / report.evaluation.n_cells
    assert f"{LOW_DEPTH} {share:.1%} {report.n_low_depth} cells, no label ventured" in lines
    assert any(
        line.startswith(f"accuracy of assigned cells {report.assigned.accuracy:.4f} [") for line in lines
    )
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["assigned"]["accuracy"] == report.assigned.accuracy


def test_no_error_is_no_proof_that_there_are_none(atlas: Path) -> None:
    report = evaluate(atlas / "atlas.zarr", atlas / "atlas.zarr", "truth", labels_column="truth")
    n = report.evaluation.n_cells
    low = binomtest(n, n).proportion_ci().low
    assert any(
        f"no error among {n} cells" in note and f"{low:.4f} is still possible" in note
        for note in report.notes
    )


def test_a_join_equals_pandas_merge() -> None:
    rng = np.random.default_rng(0)
    cells = pd.DataFrame(
        {"sample": rng.choice(["a", "b"], 300), "barcode": rng.integers(0, 400, 300).astype(str)}
    )
    cells = cells.drop_duplicates(ignore_index=True)
    others = cells.sample(100, random_state=1).reset_index(drop=True)
    rows = rows_in(*(
        CellLabels("x", t["barcode"].to_numpy(object), np.full(len(t), "A", object), t["sample"].to_numpy(object))
        for t in (cells, others)
    ))  # fmt: skip
    merged = cells.merge(others.reset_index(), on=["sample", "barcode"], how="left")
    assert rows.tolist() == merged["index"].fillna(-1).astype(int).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": None}, "--truth truth: found neither a store nor a file"),
        ({"truth_file": "t.csv"}, "--truth truth: found both a store and t.csv"),
        (
            {"labels": "tool.csv"},
            r"tool\.csv: found a file and no column of it; expected --labels-column COLUMN",
        ),
        ({"labels": "atlas.zarr"}, "found a store and no column of it; expected --labels-column COLUMN"),
        (
            {"against": "tool.csv"},
            r"tool\.csv: found a file and no column of it; expected --against-column COLUMN",
        ),
        ({"labels": "tool.csv", "labels_column": "no"}, "found no column 'no'"),
        (
            {"labels": "tool.csv", "labels_column": "label", "cells": "test"},
            "--cells test: found labels of .*which does not say which cells were held out",
        ),
        ({"labels": "nosuch"}, "nosuch: found no _manifest.json"),
        ({"labels": "nosuch.csv", "labels_column": "label"}, r"nosuch\.csv: cannot be read"),
    ],
)
def test_questions_without_an_answer_are_refused(
    atlas: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    cells_of(atlas)[["sample", "barcode", "label"]].to_csv(tmp_path / "tool.csv", index=False)
    places = {"tool.csv": tmp_path / "tool.csv", "atlas.zarr": atlas / "atlas.zarr"}
    given = {"labels": atlas / "labels", "store": atlas / "atlas.zarr", "truth": "truth"} | options
    given |= {name: places[given[name]] for name in ("labels", "against") if given.get(name) in places}
    with pytest.raises(InputError, match=message):
        evaluate(given.pop("labels"), given.pop("store"), given.pop("truth"), **given)
