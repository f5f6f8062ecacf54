"""heldout.parquet holds what predicting says of the cells that did not train; the card shows it by type."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk
from planted import small_finetuning

from annatac_scale import api
from annatac_scale.annotate.predict import predict
from annatac_scale.model.folder import read_model
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import replace_obs
from annatac_scale.train.finetune import finetune


@pytest.mark.parametrize("holdout", [0.25, "donor=D2", 0], ids=["share", "donor", "none"])
def test_cells_that_did_not_train_are_there_as_predict_labels_them(atlas, pretrained, tmp_path, holdout):
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", small_finetuning(epochs=2), holdout)
    heldout = pd.read_parquet(tmp_path / "run" / "heldout.parquet")
    split = pd.read_parquet(tmp_path / "run" / "split.parquet")
    assert heldout["split"].value_counts().to_dict() == {
        name: n for name, n in report.split.items() if name != "train" and n
    }
    both = heldout.merge(split, on=["sample", "barcode"], validate="1:1")
    assert (both["split_x"] == both["split_y"]).all()
    predict(atlas, report.model, tmp_path / "labels", novel_threshold=0, probabilities=True)
    rows = heldout.merge(pd.read_parquet(tmp_path / "labels"), on=["sample", "barcode"], suffixes=("", "_p"))
    assert len(rows) == len(heldout)
    assert (rows["best"] == rows["best_p"]).all()
    chances = np.stack(rows["probabilities"].to_list())
    assert chances == pytest.approx(np.stack(rows["probabilities_p"].to_list()), abs=1e-4)
    assert (rows["confidence"] == chances.max(axis=1)).all()
    truth = heldout.merge(atlas.obs(["cell_type"]), on=["sample", "barcode"], validate="1:1")
    assert (truth["truth"] == truth["cell_type"].astype(str)).all()
    metadata = pq.read_schema(tmp_path / "run" / "heldout.parquet").metadata
    assert tuple(json.loads(metadata[b"classes"])) == report.types


@pytest.mark.parametrize("calibration", ["temperature", "vector"])
def test_the_figures_of_val_and_test_cells_are_those_of_the_scaled_probabilities(
    atlas, pretrained, tmp_path, calibration
):
    config = small_finetuning(epochs=2, calibration=calibration, validation_share=0.3)
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", config)
    heldout = pd.read_parquet(tmp_path / "run" / "heldout.parquet")
    for split, figures in (("val", report.figures), ("test", report.test)):
        own = heldout[heldout["split"] == split]
        chances = np.stack(own["probabilities"].to_list()).astype(np.float64)
        assert figures["loss"] == pytest.approx(
            sk.log_loss(own["truth"], chances, labels=report.types), rel=1e-3
        )
        assert figures["accuracy"] == pytest.approx((own["truth"] == own["best"]).mean())


def test_the_card_and_the_model_say_what_the_test_cells_tell_of_each_type(atlas, pretrained, tmp_path):
    report = finetune(
        atlas, pretrained, "cell_type", tmp_path / "run", small_finetuning(epochs=2), "donor=D2"
    )
    heldout = pd.read_parquet(tmp_path / "run" / "heldout.parquet")
    test = heldout[heldout["split"] == "test"]
    facts, card = read_model(report.model).info.provenance, (report.model / "README.md").read_text()
    precision, recall, f1, n = sk.precision_recall_fscore_support(
        test["truth"], test["best"], labels=report.types, zero_division=0
    )
    for i, name in enumerate(report.types):
        row = facts["test_types"][i]
        assert (row["cell_type"], row["n"]) == (name, n[i])
        assert [row[key] for key in ("precision", "recall", "f1")] == pytest.approx(
            [precision[i], recall[i], f1[i]]
        )
        n_train = facts["training_cells_per_type"][name]
        assert f"| {name} | {n_train} | {n[i]} | {precision[i]:.3f} | {recall[i]:.3f} | {f1[i]:.3f} |" in card
    assert facts["confusions"]
    for sentence in facts["confusions"]:
        assert sentence in card


def test_types_without_training_cells_keep_their_names(atlas, pretrained, tmp_path):
    # All cells of a donor of two more types: none of them trains.
    shutil.copytree(atlas.path, tmp_path / "atlas.zarr")
    for name, sample in atlas.samples.items():
        obs = sample.obs()
        new = np.where(np.arange(len(obs)) % 2, "zeta", "glia")
        kind = np.where(obs["donor"] == "D2", new, obs["cell_type"])
        replace_obs(tmp_path / "atlas.zarr", name, obs.assign(kind=kind))
    store = IslandStore.open(tmp_path / "atlas.zarr")
    report = finetune(store, pretrained, "kind", tmp_path / "run", small_finetuning(epochs=1), "donor=D2")
    heldout = pd.read_parquet(tmp_path / "run" / "heldout.parquet")
    rows = heldout.merge(store.obs(["kind"]), on=["sample", "barcode"], validate="1:1")
    assert (rows["truth"] == rows["kind"].astype(str)).all()
    assert set(rows["truth"][rows["split"] == "test"]) == {"glia", "zeta"}
    assert set(rows["best"]) <= set(report.types)
    assert report.test["accuracy"] == 0


def test_the_api_leaves_a_report_and_writes_it_again_where_it_was_lost(atlas, pretrained, tmp_path):
    how = {"model": pretrained, "labels": "cell_type", "out": tmp_path / "run", "epochs": 1}
    done = api.finetune(atlas.path, **how)
    values = json.loads((tmp_path / "run" / "report.json").read_text())
    assert values["accuracy"] == pytest.approx(done.test["accuracy"])
    assert values["macro_f1"] == pytest.approx(done.test["macro_f1"])
    files = {file.name: file.read_bytes() for file in (tmp_path / "run").glob("report*")}
    assert set(files) == {
        "report.json", "report.md", "report-accuracy.png", "report-confusion.png", "report-reliability.png",
    }  # fmt: skip
    for name in files:
        (tmp_path / "run" / name).unlink()
    api.finetune(atlas.path, **how)
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").glob("report*")} == files
