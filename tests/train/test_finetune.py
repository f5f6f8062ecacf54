import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from planted import Lines, StopAfter, draw_cells, files_of, small_finetuning, small_pretraining, write_store
from scipy.special import softmax

from annatac_scale import api
from annatac_scale.errors import ConfigError, InputError, ModelError
from annatac_scale.model.calibration import fit_temperature
from annatac_scale.model.folder import read_model
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import replace_obs
from annatac_scale.train.cell_type_task import figures_of
from annatac_scale.train.cell_weights import class_weights
from annatac_scale.train.finetune import finetune
from annatac_scale.train.pretrain import pretrain
from annatac_scale.train.run_folder import RunFolder
from annatac_scale.train.splits import SplitRule, split_cells

QUICK = {"learning_rate": 3e-2, "table_learning_rate": 1e-2, "encoder_learning_rate": 3e-3}


def predict_one_by_one(model_path, store, cells):
    """Logits of each cell alone, straight from encoder and head; attend open."""
    model = read_model(model_path)
    number = {island: i for i, island in enumerate(model.vocabulary.islands.tolist())}
    dense = store.read(cells).to_csr(store.n_islands).toarray()
    logits = []
    for row in dense:
        listed = [island for island in np.flatnonzero(row).tolist() if island in number]
        tokens = torch.tensor([int(row[island]) for island in listed], dtype=torch.int64)
        islands = torch.tensor([number[island] for island in listed], dtype=torch.int64)
        offsets = torch.tensor([0, len(listed)])
        with torch.no_grad():
            hidden = model.encoder.linformer(tokens, islands, offsets)
            logits.append(model.typer.head(hidden, tokens, islands, offsets)[0].numpy())
    return model.info.labels, np.array(logits)


def figures_by_hand(truth, best):
    """Accuracy and macro F1 over the types in the truth, from their definitions."""
    truth, best = np.asarray(truth), np.asarray(best)
    f1 = []
    for name in sorted(set(truth)):
        right = ((truth == name) & (best == name)).sum()
        f1.append(2 * right / ((truth == name).sum() + (best == name).sum()))
    return (truth == best).mean(), np.mean(f1)


@pytest.mark.parametrize("attend", ["open", "all"])
@pytest.mark.parametrize("head", ["pooled", "cnn", "subtype"])
def test_every_head_learns_types_that_open_islands_of_their_own(atlas, tmp_path, head, attend):
    pre = pretrain(atlas, tmp_path / "pre", small_pretraining(1, attend=attend)).model
    report = finetune(atlas, pre, "cell_type", tmp_path / "run", small_finetuning(head, 6, **QUICK))
    assert report.types == ("astro", "neuron")
    assert report.test["accuracy"] >= 0.95
    assert read_model(report.model).info.head.kind == head


@pytest.mark.parametrize("holdout", [0.25, "donor=D2"], ids=["share", "donor"])
def test_figures_are_those_of_predicting_every_cell_alone(atlas, pretrained, tmp_path, holdout):
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", small_finetuning(epochs=2), holdout)
    obs = atlas.obs(["cell_type", "donor"])
    rows = pq.read_table(tmp_path / "run" / "split.parquet").to_pandas()
    assert len(rows) == 400
    split = obs.merge(rows, on=["sample", "barcode"], how="left", validate="one_to_one")["split"]
    if holdout == "donor=D2":
        assert ((split == "test") == (obs["donor"] == "D2")).all()
    assert split.value_counts().to_dict() == report.split
    for name, figures in (("val", report.figures), ("test", report.test)):
        cells = np.flatnonzero(split == name)
        types, logits = predict_one_by_one(report.model, atlas, cells)
        truth = obs["cell_type"].to_numpy(str)[cells]
        accuracy, macro_f1 = figures_by_hand(truth, np.array(types)[logits.argmax(axis=1)])
        assert figures["accuracy"] == pytest.approx(accuracy)
        assert figures["macro_f1"] == pytest.approx(macro_f1)
        of_truth = softmax(logits.astype(float) / report.temperature, axis=1)[
            np.arange(len(cells)), [types.index(t) for t in truth]
        ]
        assert figures["loss"] == pytest.approx(-np.log(of_truth).mean(), rel=1e-3, abs=1e-6)


def test_the_temperature_is_fitted_on_the_val_cells(atlas, pretrained, tmp_path):
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", small_finetuning(epochs=1))
    rows = pq.read_table(tmp_path / "run" / "split.parquet").to_pandas()
    cells = np.flatnonzero(rows["split"] == "val")
    types, logits = predict_one_by_one(report.model, atlas, cells)
    truth = [types.index(name) for name in atlas.obs(["cell_type"])["cell_type"][cells]]
    assert report.temperature == pytest.approx(fit_temperature(logits, np.array(truth)), rel=1e-2)
    assert read_model(report.model).info.temperature == report.temperature


def test_the_model_folder_says_what_it_was_made_of(atlas, pretrained, tmp_path):
    config = small_finetuning("cnn", 1, class_weights="paper")
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", config, "donor=D1")
    info = read_model(report.model).info
    assert info.labels == report.types
    facts = info.provenance
    assert facts["kind"] == "finetuned"
    assert (facts["labels"], facts["holdout"], facts["class_weights"]) == ("cell_type", "donor=D1", "paper")
    assert facts["pretrained"]["kind"] == "pretrained"
    assert facts["pretrained"]["digest"] == read_model(pretrained).digest
    assert sum(facts["training_cells_per_type"].values()) == report.split["train"]
    card = (report.model / "README.md").read_text()
    assert "labels from obs column `cell_type`, held out: donor=D1" in card
    assert "\n- test (cells that fine-tuning never saw): accuracy " in card
    assert (
        "pretraining saw all cells of these samples without their labels, the test cells among them" in card
    )


def relabelled(store, path, labels, column="cell_type"):
    """A copy of a store with a column changed: X stays as it is."""
    cells = {name: (sample.n_cells, sample.obs()) for name, sample in store.samples.items()}
    rows = store.read(np.arange(store.n_cells)).to_csr(store.n_islands).toarray()
    start, samples = 0, {}
    for name, (n, obs) in cells.items():
        new = obs.assign(**{column: labels[start : start + n]})
        samples[name] = replace(draw_cells(1), levels=rows[start : start + n], obs=new)
        start += n
    return write_store(path, samples)


def test_labels_that_are_joined_after_pretraining_do_not_hide_what_it_saw(atlas, pretrained, tmp_path):
    store = relabelled(atlas, tmp_path / "a.zarr", np.full(400, "unknown", object))
    pre = pretrain(store, tmp_path / "pre", small_pretraining(1)).model
    for name, sample in store.samples.items():
        replace_obs(store.path, name, sample.obs().assign(cell_type=atlas.samples[name].obs()["cell_type"]))
    store = IslandStore.open(store.path)
    report = finetune(store, pre, "cell_type", tmp_path / "run", small_finetuning(epochs=1))
    assert "pretraining saw all cells of these samples" in (report.model / "README.md").read_text()


def test_cells_that_pretraining_did_not_see_are_said_to_be_new(pretrained, tmp_path):
    store = write_store(tmp_path / "a.zarr", {"new": draw_cells(200, seed=7)})
    report = finetune(store, pretrained, "cell_type", tmp_path / "run", small_finetuning(epochs=1))
    assert "pretraining saw none of these cells" in (report.model / "README.md").read_text()


def test_a_second_fine_tuning_on_the_same_samples_warns_of_its_test_figures(atlas, pretrained, tmp_path):
    first = finetune(atlas, pretrained, "cell_type", tmp_path / "one", small_finetuning(epochs=1))
    second = finetune(atlas, first.model, "donor", tmp_path / "two", small_finetuning(epochs=1))
    assert second.types == ("D1", "D2", "D3")
    assert (
        "an earlier fine-tuning trained on cells of these samples" in (second.model / "README.md").read_text()
    )


def test_a_pooled_head_starts_from_the_pretrained_pooled_layer(atlas, tmp_path):
    asked = {"objective": "vector", "mask_fraction": 0.5, "mask_level_cap": 0.5, "pooled": 6}
    model = pretrain(atlas, tmp_path / "pre", small_pretraining(2, **asked)).model
    head = replace(small_finetuning().head, pooled=6)
    config = replace(small_finetuning(epochs=1, learning_rate=1e-9, table_learning_rate=1e-9), head=head)
    report = finetune(atlas, model, "cell_type", tmp_path / "run", config)
    before, after = read_model(model).encoder.pool, read_model(report.model).typer.head.pool
    torch.testing.assert_close(after.table, before.table)
    assert torch.equal(after.idf, before.idf)
    assert read_model(report.model).info.pool is None
    with pytest.raises(
        ConfigError, match=r"head.pooled: found 64, expected the 6 channels .*; use --set head.pooled=6"
    ):
        finetune(
            atlas, model, "cell_type", tmp_path / "other", replace(config, head=replace(head, pooled=64))
        )


def test_an_encoder_that_was_not_trained_is_not_frozen_under_a_head_that_reads_it(atlas, tmp_path):
    asked = {"objective": "vector", "reads": "none", "mask_fraction": 0.5}
    model = pretrain(atlas, tmp_path / "pre", small_pretraining(1, **asked)).model
    with pytest.raises(
        ConfigError, match="--freeze-encoder: the head reads the Linformer, which pretraining did not"
    ):
        finetune(atlas, model, "cell_type", tmp_path / "run", small_finetuning("cnn", freeze_encoder=True))
    report = finetune(atlas, model, "cell_type", tmp_path / "cnn", small_finetuning("cnn", epochs=1))
    assert read_model(report.model).info.linformer_trained


def test_a_head_that_does_not_read_the_encoder_leaves_it_as_it_was(atlas, pretrained, tmp_path):
    head = replace(small_finetuning().head, reads="none")
    report = finetune(
        atlas, pretrained, "cell_type", tmp_path / "run", replace(small_finetuning(epochs=2), head=head)
    )
    model = read_model(report.model)
    before = read_model(pretrained).encoder.linformer.state_dict()
    assert all(
        torch.equal(before[name], value) for name, value in model.encoder.linformer.state_dict().items()
    )
    assert model.typer.head.pool.gate is None
    assert report.figures["accuracy"] > 0.9


def test_a_frozen_encoder_keeps_its_bits_and_the_head_learns(atlas, pretrained, tmp_path):
    config = small_finetuning(epochs=3, freeze_encoder=True, **QUICK)
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", config)
    before, after = read_model(pretrained).encoder.linformer, read_model(report.model).encoder.linformer
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    assert report.test["accuracy"] >= 0.95


def test_an_encoder_that_is_not_frozen_is_trained_but_for_its_positions(atlas, pretrained, tmp_path):
    config = small_finetuning("cnn", 1, **QUICK)
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", config)
    before, after = (read_model(path).encoder.linformer.state_dict() for path in (pretrained, report.model))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"positions"}


def test_types_without_training_cells_count_as_errors_each_in_the_mean_of_f1(atlas, pretrained, tmp_path):
    labels = atlas.obs(["cell_type"])["cell_type"].to_numpy(object)
    donors = atlas.obs(["donor"])["donor"].to_numpy(object)
    strangers = np.flatnonzero(donors == "D3")
    labels[strangers[:10]] = "glia"
    labels[strangers[10:15]] = "microglia"
    store = relabelled(atlas, tmp_path / "a.zarr", labels)
    report = finetune(store, pretrained, "cell_type", tmp_path / "run", small_finetuning(), "donor=D3")
    assert report.types == ("astro", "neuron")
    types, logits = predict_one_by_one(report.model, store, strangers)
    accuracy, macro_f1 = figures_by_hand(labels[strangers], np.array(types)[logits.argmax(axis=1)])
    assert report.test["accuracy"] == pytest.approx(accuracy)
    assert report.test["macro_f1"] == pytest.approx(macro_f1)
    assert report.test["accuracy"] <= 1 - 15 / len(strangers)


def test_a_held_out_type_alone_has_figures_without_a_loss(atlas, pretrained, tmp_path):
    labels = atlas.obs(["cell_type"])["cell_type"].to_numpy(object)
    labels[::5] = "glia"
    store = relabelled(atlas, tmp_path / "a.zarr", labels)
    config = small_finetuning(epochs=1)
    report = finetune(store, pretrained, "cell_type", tmp_path / "run", config, "cell_type=glia")
    assert report.test == {"accuracy": 0.0, "macro_f1": 0.0}


def test_cells_without_a_label_are_left_out_whole_numbers_are_labels(atlas, pretrained, tmp_path):
    labels = pd.Series((atlas.obs(["cell_type"])["cell_type"] == "astro").astype(float) + 3)
    labels[::4] = np.nan
    store = relabelled(atlas, tmp_path / "a.zarr", labels.to_numpy())
    report = finetune(store, pretrained, "cell_type", tmp_path / "run", small_finetuning(epochs=1))
    assert report.types == ("3", "4")
    assert report.n_without_label == 100
    assert sum(report.split.values()) == 300
    assert len(pq.read_table(tmp_path / "run" / "split.parquet")) == 300


def test_progress_and_card_say_how_many_cells_lack_the_value_that_is_held_out(atlas, pretrained, tmp_path):
    donors = atlas.obs(["donor"])["donor"].to_numpy(object)
    donors[::5] = None
    store = relabelled(atlas, tmp_path / "a.zarr", donors, "known_donor")
    progress = Lines()
    config = small_finetuning(epochs=1)
    report = finetune(
        store, pretrained, "cell_type", tmp_path / "run", config, "known_donor=D2", progress=progress
    )
    assert sum(report.split.values()) == 320
    said = "80 labelled ones without a known_donor, which are left out"
    assert any(line.startswith("labels cell_type: ") and line.endswith(said) for line in progress.lines)
    assert (
        "held out: known_donor=D2; 80 labelled cells without a known_donor are left out\n"
        in (report.model / "README.md").read_text()
    )


def test_a_model_that_was_read_is_fine_tuned_as_its_folder_is_but_not_an_unwritten_one(
    atlas, pretrained, tmp_path
):
    config = small_finetuning(epochs=1)
    finetune(atlas, pretrained, "cell_type", tmp_path / "folder", config)
    finetune(atlas, read_model(pretrained), "cell_type", tmp_path / "read", config)
    assert files_of(tmp_path / "read" / "model") == files_of(tmp_path / "folder" / "model")
    with pytest.raises(ModelError, match="the model was never written"):
        finetune(atlas, replace(read_model(pretrained), digest=""), "cell_type", tmp_path / "no", config)
    assert not (tmp_path / "no").exists()


def test_a_type_with_one_cell_trains(atlas, pretrained, tmp_path):
    labels = atlas.obs(["cell_type"])["cell_type"].to_numpy(object)
    labels[17] = "rare"
    store = relabelled(atlas, tmp_path / "a.zarr", labels)
    report = finetune(store, pretrained, "cell_type", tmp_path / "run", small_finetuning(epochs=1))
    assert report.types == ("astro", "neuron", "rare")
    info = read_model(report.model).info
    assert info.provenance["training_cells_per_type"]["rare"] == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(400, None, object), "0 cell types have training cells"),
        (
            np.where(np.arange(400) < 6, np.array(["a", "b"] * 200, object), None),
            "found 2 types in 6 cells; use --head linear, which needs none, label more cells, hold out fewer, or --set",
        ),
        (
            np.random.default_rng(0).random(400),
            r"too few labelled cells of each .* 400 types in 400 cells; is this a column of cell types\?; use --head",
        ),
    ],
    ids=["none", "six", "numbers"],
)
def test_too_few_labelled_cells_are_refused(atlas, pretrained, tmp_path, labels, message):
    store = relabelled(atlas, tmp_path / "a.zarr", labels)
    with pytest.raises(InputError, match=message):
        finetune(store, pretrained, "cell_type", tmp_path / "run", small_finetuning())
    assert not (tmp_path / "run").exists()


def test_an_unknown_column_or_a_foreign_store_is_refused(atlas, pretrained, tmp_path):
    with pytest.raises(InputError, match="no obs column 'type'"):
        finetune(atlas, pretrained, "type", tmp_path / "run", small_finetuning())
    cells = draw_cells(100)
    foreign = write_store(tmp_path / "f.zarr", {"s0": replace(cells, levels=cells.levels[:, :40])})
    with pytest.raises(ModelError, match="does not fit the model"):
        finetune(foreign, pretrained, "cell_type", tmp_path / "run", small_finetuning())


@pytest.mark.parametrize("head", ["pooled", "cnn"])
def test_interrupted_the_same_command_gives_the_same_bits(atlas, pretrained, tmp_path, head):
    config = small_finetuning(head, 4)
    expected = finetune(atlas, pretrained, "cell_type", tmp_path / "undisturbed", config)
    with pytest.raises(KeyboardInterrupt):
        finetune(atlas, pretrained, "cell_type", tmp_path / "run", config, progress=StopAfter(2))
    progress = Lines()
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", config, progress=progress)
    assert any(line.startswith("resuming") for line in progress.lines)
    assert replace(report, model=expected.model) == expected
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "undisturbed" / "model")
    split = [(tmp_path / run / "split.parquet").read_bytes() for run in ("run", "undisturbed")]
    assert split[0] == split[1]


def test_killed_before_the_model_was_written_the_same_command_only_writes_it(
    atlas, pretrained, tmp_path, monkeypatch
):
    config = small_finetuning(epochs=2)
    expected = finetune(atlas, pretrained, "cell_type", tmp_path / "undisturbed", config)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("annatac_scale.train.finetune.write_model", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(atlas, pretrained, "cell_type", tmp_path / "run", config)
    monkeypatch.undo()
    progress = Lines()
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", config, progress=progress)
    assert not any(line.startswith("epoch") for line in progress.lines)
    assert replace(report, model=expected.model) == expected
    assert files_of(report.model) == files_of(expected.model)


def test_a_complete_run_is_left_as_it_is_and_another_one_is_refused(atlas, pretrained, tmp_path):
    config = small_finetuning(epochs=1)
    first = finetune(atlas, pretrained, "cell_type", tmp_path / "run", config)
    files = files_of(first.model)
    progress = Lines()
    assert finetune(atlas, pretrained, "cell_type", tmp_path / "run", config, progress=progress) == first
    assert progress.lines[-1] == f"{tmp_path / 'run'}: complete already; its model stays as it is"
    assert files_of(first.model) == files
    with pytest.raises(ConfigError, match=r"holdout 0\.2 \(now 0\.3\); labelled_cells"):
        finetune(atlas, pretrained, "cell_type", tmp_path / "run", config, 0.3)
    with pytest.raises(ConfigError, match=r"labels cell_type \(now donor\)"):
        finetune(atlas, pretrained, "donor", tmp_path / "run", config)


def test_training_stops_early_when_validation_gains_nothing(atlas, pretrained, tmp_path):
    config = small_finetuning(epochs=40, patience=2, **QUICK)
    progress = Lines()
    finetune(atlas, pretrained, "cell_type", tmp_path / "run", config, progress=progress)
    assert sum(line.startswith("epoch") for line in progress.lines) < 20


def test_a_small_set_trains_for_more_epochs_until_it_has_its_steps(atlas, pretrained, tmp_path):
    config = small_finetuning(epochs=1, min_steps=20, patience=100, **QUICK)
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "ft", config)
    last = json.loads((tmp_path / "ft" / "metrics.jsonl").read_text().splitlines()[-1])
    steps_per_epoch = -(-report.split["train"] // 32)
    assert last["epoch"] == -(-20 // steps_per_epoch)
    assert last["step"] == last["epoch"] * steps_per_epoch >= 20


def test_test_cells_are_never_read_in_training(atlas, pretrained, tmp_path):
    """Other test cells, the same model: whatever they hold, it does not enter the weights."""
    rule = SplitRule(0.2, 0.1, 0.1, 0)
    test = split_cells(atlas, "cell_type", rule).of("test")
    rows = atlas.read(np.arange(400)).to_csr(60).toarray()
    rows[test] = 0
    rows[test, ::2] = 5
    samples, start = {}, 0
    for name, sample in atlas.samples.items():
        samples[name] = replace(draw_cells(1), levels=rows[start : start + sample.n_cells], obs=sample.obs())
        start += sample.n_cells
    changed = write_store(tmp_path / "a.zarr", samples)
    config = small_finetuning(epochs=2)
    weights = [
        files_of(finetune(store, pretrained, "cell_type", tmp_path / name, config).model)[
            "weights.safetensors"
        ]
        for name, store in (("one", atlas), ("two", changed))
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", [1, 1, 1]),
        ("balanced", [100 / 3 / 50, 100 / 3 / 40, 100 / 3 / 10]),
        ("paper", [0.25, 0.36, 0.81]),
    ],
)
def test_class_weights_follow_their_formula(rule, expected):
    weights = class_weights(np.array([50, 40, 10]), rule)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_balanced_weights_weigh_a_mean_cell_by_one():
    counts = np.array([7, 1, 92, 33])
    assert (class_weights(counts, "balanced") * counts).sum() == pytest.approx(counts.sum())


def test_figures_without_cells_are_none():
    assert figures_of(np.empty((0, 3), np.float32), np.empty(0, np.int64)) == {}


def test_the_config_of_a_run_gives_its_settings_back(atlas, pretrained, tmp_path):
    first = api.finetune(
        atlas.path,
        model=pretrained,
        labels="cell_type",
        out=tmp_path / "one",
        epochs=1,
        settings=["train.seed=3"],
    )
    again = api.finetune(
        atlas.path,
        model=pretrained,
        labels="cell_type",
        out=tmp_path / "two",
        config=tmp_path / "one" / "config.toml",
    )
    assert files_of(first.model) == files_of(again.model)


def test_checkpoints_that_are_all_damaged_stop_a_resumed_run(atlas, pretrained, tmp_path):
    config = small_finetuning(epochs=3)
    with pytest.raises(KeyboardInterrupt):
        finetune(atlas, pretrained, "cell_type", tmp_path / "run", config, progress=StopAfter(1))
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"checkpoints: none of 2 checkpoints is whole; remove this folder"):
        finetune(atlas, pretrained, "cell_type", tmp_path / "run", config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", config)
    assert RunFolder(tmp_path / "run", config, {}).complete
    assert report.model.exists()


@pytest.mark.parametrize("freeze", [False, True], ids=["trained", "frozen"])
def test_the_optimizer_has_every_weight_once_and_decays_the_head_table_alone(
    atlas, pretrained, tmp_path, monkeypatch, freeze
):
    seen = []

    class Recording(torch.optim.AdamW):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            seen.extend(self.param_groups)

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    config = small_finetuning(epochs=1, weight_decay=0.3, freeze_encoder=freeze)
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", config)
    typer = read_model(report.model).typer
    decayed = [p.shape for group in seen for p in group["params"] if group["weight_decay"]]
    assert decayed == [typer.head.pool.table.shape]
    assert {group["weight_decay"] for group in seen} == {0.0, 0.3}
    trained = [p for group in seen for p in group["params"]]
    expected = list((typer.head if freeze else typer).parameters())
    assert len({id(p) for p in trained}) == len(trained) == len(expected)
    assert sorted(tuple(p.shape) for p in trained) == sorted(tuple(p.shape) for p in expected)
