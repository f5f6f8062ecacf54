"""Fine-tuning on donors: whole ones test, and what is peculiar to a donor does not flatter the figures."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from planted import Cells, Lines, files_of, small_finetuning, small_pretraining, write_store

from annatac_scale.cli import main
from annatac_scale.errors import ConfigError
from annatac_scale.model.folder import read_model
from annatac_scale.train.finetune import finetune
from annatac_scale.train.pretrain import pretrain

N_DONORS, ISLANDS_A_DONOR, N_COMMON = 6, 20, 10
QUICK = {"learning_rate": 3e-2, "table_learning_rate": 3e-2, "encoder_learning_rate": 3e-3}


def private_cells(n=600, seed=0):
    """Cells of six donors whose two types differ only in islands that their donor alone opens.

    Of a donor's 20 islands a type opens one half, and which one is drawn by donor: an unseen donor's types cannot be
    told, those of a donor that trains can, without fail.
    """
    rng = np.random.default_rng(seed)
    donor, kind = rng.integers(0, N_DONORS, n), rng.integers(0, 2, n)
    levels = np.zeros((n, N_DONORS * ISLANDS_A_DONOR + N_COMMON), np.uint8)
    levels[:, -N_COMMON:] = rng.random((n, N_COMMON)) < 0.5
    for cell in range(n):
        first = donor[cell] * ISLANDS_A_DONOR + kind[cell] * ISLANDS_A_DONOR // 2
        levels[cell, first : first + ISLANDS_A_DONOR // 2] = rng.random(ISLANDS_A_DONOR // 2) < 0.8
    obs = pd.DataFrame(
        {"cell_type": np.array(["astro", "neuron"])[kind], "donor": [f"D{number}" for number in donor]},
        index=pd.Index([f"cell{number}" for number in range(n)], name="barcode"),
    )
    return Cells(levels, obs)


@pytest.fixture(scope="module")
def donors(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("donors") / "a.zarr", {"s0": private_cells()})


@pytest.fixture(scope="module")
def model(donors, tmp_path_factory):
    return pretrain(donors, tmp_path_factory.mktemp("model") / "run", small_pretraining(1)).model


@pytest.mark.parametrize("head", ["pooled", "cnn", "linear"])
def test_a_batch_label_does_not_leak_into_the_split(donors, model, tmp_path, head):
    config = small_finetuning(head, 20, patience=30, **QUICK)
    if head == "linear":
        config = replace(config, head=replace(config.head, pooled=32))
    by_cell = finetune(donors, model, "cell_type", tmp_path / "cells", config)
    by_donor = finetune(donors, model, "cell_type", tmp_path / "donors", config, group="donor")
    assert by_cell.test["accuracy"] > 0.9
    assert by_donor.test["accuracy"] < 0.75
    assert by_donor.figures["accuracy"] < 0.75
    rows = pq.read_table(tmp_path / "donors" / "split.parquet").to_pandas()
    split = donors.obs(["donor"]).merge(rows, on=["sample", "barcode"], validate="one_to_one")
    assert split.groupby("donor")["split"].nunique().max() == 1
    assert split["split"].value_counts().to_dict() == by_donor.split


def test_early_stopping_goes_by_macro_f1_of_the_val_donors(donors, model, tmp_path):
    config = small_finetuning(epochs=6, patience=30, **QUICK)
    report = finetune(donors, model, "cell_type", tmp_path / "run", config, group="donor")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [
        (line["validation_macro_f1"], line["validation_loss"]) for line in lines if "validation_loss" in line
    ]
    scores = [macro_f1 - 0.01 * loss for macro_f1, loss in found]
    assert len(scores) == 6
    best = int(np.argmax(scores))
    assert report.figures["macro_f1"] == pytest.approx(found[best][0])
    assert report.figures["epoch"] == best + 1
    info = read_model(report.model).info
    (val,) = info.provenance["groups"]["of_split"]["val"]
    assert report.split["val"] == (donors.obs(["donor"])["donor"] == val).sum()


def test_progress_and_card_say_which_groups_are_whole(donors, model, tmp_path):
    progress = Lines()
    config = small_finetuning(epochs=1)
    report = finetune(
        donors, model, "cell_type", tmp_path / "run", config, "donor=D2", progress=progress, group="donor"
    )
    line = next(line for line in progress.lines if line.startswith("whole groups of donor: val D"))
    assert "; test D2; train D" in line
    assert line.endswith("; 0 labelled cells without a group are left out")
    assert f"\n- {line}\n" in (report.model / "README.md").read_text()


def test_three_donors_leave_none_to_validate_which_is_said(model, tmp_path):
    cells = private_cells()
    kept = cells.obs["donor"].isin(["D0", "D1", "D2"]).to_numpy()
    obs = cells.obs[kept].assign(donor=lambda obs: obs["donor"].where(np.arange(len(obs)) >= 7))
    store = write_store(tmp_path / "a.zarr", {"s0": Cells(cells.levels[kept], obs)})
    progress = Lines()
    report = finetune(
        store,
        model,
        "cell_type",
        tmp_path / "run",
        small_finetuning(epochs=1),
        progress=progress,
        group="donor",
    )
    line = next(line for line in progress.lines if line.startswith("whole groups of donor: test D"))
    assert (
        "; val and calib: cells of the groups that train, of which none can be spared; 7 labelled cells"
        in line
    )
    assert report.split["val"] > 0
    assert sum(report.split.values()) == kept.sum() - 7


def test_group_weights_change_the_weights_and_need_groups(donors, model, tmp_path):
    plain = small_finetuning(epochs=1)
    balanced = replace(plain, group_weights="balanced")
    with pytest.raises(ConfigError, match="group_weights: found 'balanced' without --group"):
        finetune(donors, model, "cell_type", tmp_path / "no", balanced)
    weights = [
        files_of(finetune(donors, model, "cell_type", tmp_path / name, config, group="donor").model)
        for name, config in (("plain", plain), ("balanced", balanced))
    ]
    assert weights[0]["weights.safetensors"] != weights[1]["weights.safetensors"]
    with pytest.raises(ConfigError, match="group_weights: found 'sqrt', expected none or balanced"):
        replace(plain, group_weights="sqrt")


def test_another_group_column_is_another_run(donors, model, tmp_path):
    config = small_finetuning(epochs=1)
    finetune(donors, model, "cell_type", tmp_path / "run", config, group="donor")
    with pytest.raises(ConfigError, match=r"group donor \(now \)"):
        finetune(donors, model, "cell_type", tmp_path / "run", config)


def test_the_command_takes_a_group_and_names_what_it_judged_on(donors, model, tmp_path):
    command = ["finetune", str(donors.path), "--model", str(model), "--labels", "cell_type"]
    options = ["--out", str(tmp_path / "run"), "--group", "donor", "--head", "linear"]
    done = CliRunner().invoke(main, [*command, *options])
    assert done.exit_code == 0, done.output
    assert ": 2 types, val accuracy " in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "cell_type", "--group", ""], "no obs column ''; there are"),
        (["--labels", ""], "no obs column ''; there are"),
        (["--labels", "cell_type", "--holdout", "donor="], "--holdout donor=: found no value"),
        (["--labels", "cell_type", "--holdout", "=D3"], "--holdout =D3: found no column"),
    ],
)
def test_the_command_refuses_an_empty_name_in_a_line(donors, model, tmp_path, options, message):
    command = ["finetune", str(donors.path), "--model", str(model), "--out", str(tmp_path / "run"), *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "run").exists()
