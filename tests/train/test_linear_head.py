"""The linear head: what it is fitted to, and when it is the default."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from planted import Lines, draw_cells, files_of, small_finetuning, small_pretraining, write_store
from scipy import sparse
from scipy.special import softmax
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression

from annatac_scale import api
from annatac_scale.errors import ConfigError, InputError
from annatac_scale.model.calibration import fit_temperature
from annatac_scale.model.folder import read_model
from annatac_scale.model.novelty import TRENDED
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.selection import sequential
from annatac_scale.train import confidence_fit
from annatac_scale.train.finetune import finetune
from annatac_scale.train.pretrain import pretrain
from annatac_scale.train.probe import ROW_NORM, deal_folds, directions, fit_probe
from annatac_scale.train.splits import SplitRule, cell_hashes, split_cells


def store_of(path, labels_a_type, own=0.8, other=0.05, **columns):
    """600 cells, of which so many of each type have a label in ``few``; all have one in ``cell_type``."""
    cells = draw_cells(600, seed=5, own=own, other=other)
    types = cells.obs["cell_type"]
    few = types.where(types.groupby(types).cumcount() < labels_a_type)
    return write_store(path, {"s0": replace(cells, obs=cells.obs.assign(few=few, **columns))})


@pytest.fixture(scope="module")
def pooled(atlas, tmp_path_factory):
    """A pretrained model with a pooled layer that does not read the Linformer."""
    asked = {"objective": "vector", "reads": "none", "mask_fraction": 0.5, "pooled": 6}
    return pretrain(atlas, tmp_path_factory.mktemp("pooled") / "run", small_pretraining(2, **asked)).model


def linear(pooled_channels=6, reads="none", **options):
    config = small_finetuning("linear", **options)
    return replace(config, head=replace(config.head, pooled=pooled_channels, reads=reads))


def z_of(model_path, store):
    """z of the pretrained pooled layer of all cells."""
    model = read_model(model_path)
    lister, numbers = model.lister(store), model.vocabulary.new_of_old()
    parts = []
    for ids, rows in sequential(store):
        with torch.inference_mode():
            parts.append(
                model.encoder(lister(Batch.from_open(ids, rows.renumber(numbers)))).embedding.numpy()
            )
    return np.concatenate(parts).astype(float)


def rows_of(model_path, store):
    """Binary x idf of the model's pooled layer in unit rows, of all cells."""
    model = read_model(model_path)
    rows = store.read(np.arange(store.n_cells)).to_csr(store.n_islands)[:, model.vocabulary.islands]
    values = (rows.toarray() > 0) * model.encoder.pool.idf.numpy().astype(float)
    return sparse.csr_array(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))


def probe_of(model_path, store, training, codes):
    """The fit, of vectors and islands that this module makes."""
    weights = len(codes) / (codes.max() + 1) / np.bincount(codes)[codes]
    rows = rows_of(model_path, store)[training]
    return fit_probe(z_of(model_path, store)[training], rows, codes, weights, deal_folds(codes, None, 0))


def logits_of(model_path, store):
    """Logits of all cells, from the written model."""
    model = read_model(model_path)
    lister, numbers = model.lister(store), model.vocabulary.new_of_old()
    batches = [lister(Batch.from_open(ids, rows.renumber(numbers))) for ids, rows in sequential(store)]
    return np.concatenate([model.typer.predict(batch) for batch in batches])


def test_the_linear_head_is_the_mean_of_regressions_on_frozen_vectors_and_on_islands(pooled, tmp_path):
    store = store_of(tmp_path / "a.zarr", 10)
    progress = Lines()
    report = finetune(store, pooled, "few", tmp_path / "run", linear(), progress=progress)
    told = [line for line in progress.lines if line.startswith("linear head: regression on")]
    strengths = {line.split()[4].rstrip(":"): float(line.split()[7]) for line in told}
    assert list(strengths) == ["vectors", "islands"]
    labelled = split_cells(store, "few", SplitRule(0.2, 0.1, 0.1, 0))
    training = np.sort(np.concatenate([labelled.of("train"), labelled.of("val")]))
    assert report.split == {"train": len(training), "val": 0, "calib": 2, "test": 4}
    z = z_of(pooled, store)
    moved = z - z[training].mean(0)
    on = {
        "vectors": moved / np.linalg.norm(moved, axis=1, keepdims=True),
        "islands": ROW_NORM * rows_of(pooled, store).toarray(),
    }
    truth = store.obs(["cell_type"])["cell_type"].to_numpy(str)
    decisions = []
    for name, rows in on.items():
        bar = LogisticRegression(C=strengths[name], class_weight="balanced", tol=1e-8, max_iter=10_000)
        decisions.append(bar.fit(rows[training], truth[training]).decision_function(rows))
    logits = logits_of(report.model, store)
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], np.mean(decisions, axis=0), atol=3e-2)


def test_the_islands_can_be_left_out(pooled, tmp_path):
    store = store_of(tmp_path / "a.zarr", 10)
    config = linear()
    config = replace(config, head=replace(config.head, per_island=False))
    report = finetune(store, pooled, "few", tmp_path / "run", config)
    made = read_model(report.model)
    assert made.typer.head.per_island is None
    labelled = split_cells(store, "few", SplitRule(0.2, 0.1, 0.1, 0)).with_val_training()
    codes = labelled.codes_of(labelled.of("train"))
    weights = len(codes) / 2 / np.bincount(codes)[codes]
    z = z_of(pooled, store)
    probe = fit_probe(z[labelled.of("train")], None, codes, weights, deal_folds(codes, None, 0))
    expected = directions(z, probe.centre) @ probe.weight.T + probe.bias
    np.testing.assert_allclose(logits_of(report.model, store), expected, atol=1e-3)


def test_the_probe_leaves_pooled_layer_and_encoder_as_they_were(pooled, tmp_path):
    report = finetune(store_of(tmp_path / "a.zarr", 10), pooled, "few", tmp_path / "run", linear())
    before, after = read_model(pooled), read_model(report.model)
    for part in ("linformer", "pool"):
        old, new = (getattr(model.encoder, part).state_dict() for model in (before, after))
        assert all(torch.equal(old[name], new[name]) for name in old), part
    assert after.info.head.kind == report.head == "linear"
    assert after.info.pooled_layer.pooled == 6
    assert not after.info.linformer_trained


def test_temperature_and_figures_are_those_of_cells_that_the_fit_did_not_see(pooled, tmp_path):
    store = store_of(tmp_path / "a.zarr", 30, own=0.4, other=0.3)
    report = finetune(store, pooled, "few", tmp_path / "run", linear())
    labelled = split_cells(store, "few", SplitRule(0.2, 0.1, 0.1, 0)).with_val_training()
    training = labelled.of("train")
    codes = labelled.codes_of(training)
    probe = probe_of(pooled, store, training, codes)
    assert report.judged_on == "out-of-fold training"
    assert report.temperature == pytest.approx(fit_temperature(probe.logits, codes), rel=1e-2)
    assert report.figures["accuracy"] == pytest.approx((probe.logits.argmax(1) == codes).mean())
    assert 0.5 < report.figures["accuracy"] < 1
    card = (report.model / "README.md").read_text()
    assert "fitted on the out-of-fold training cells" in card
    assert "\n- out-of-fold training: accuracy " in card


def test_depth_trends_are_of_training_cells_whose_fold_is_left_out(pooled, tmp_path):
    store = store_of(tmp_path / "a.zarr", 30, own=0.4, other=0.3)
    model = read_model(finetune(store, pooled, "few", tmp_path / "run", linear()).model)
    labelled = split_cells(store, "few", SplitRule(0.2, 0.1, 0.1, 0)).with_val_training()
    training = labelled.of("train")
    codes = labelled.codes_of(training)
    folds = deal_folds(codes, None, 0).number
    z = z_of(pooled, store)[training]
    rows = z - z.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    opened = store.read(training).to_csr(store.n_islands)[:, model.vocabulary.islands].toarray() > 0
    n_open = opened.sum(axis=1)
    raws = {name: np.empty(len(rows)) for name in TRENDED}
    logits = probe_of(pooled, store, training, codes).logits / model.info.temperature
    raws["energy"] = -model.info.temperature * np.log(np.exp(logits).sum(axis=1))
    for cell in range(len(rows)):
        rest = folds != folds[cell]
        means = np.stack([rows[rest & (codes == code)].mean(0) for code in range(2)])
        spread, _ = ledoit_wolf(rows[rest] - means[codes[rest]], assume_centered=True)
        off = rows[cell] - means
        raws["mahalanobis"][cell] = np.sqrt(np.einsum("ij,jk,ik->i", off, np.linalg.inv(spread), off)).min()
        of_types = [np.linalg.norm(rows[rest & (codes == code)] - rows[cell], axis=1) for code in range(2)]
        raws["knn"][cell] = min(np.sort(far)[math.ceil(len(far) / 20) - 1] for far in of_types)
        counts = np.stack([opened[rest & (codes == code)].sum(axis=0) for code in range(2)]).astype(float)
        everywhere = counts.sum(axis=0) + 0.5
        shares = counts + 200 * everywhere / everywhere.sum()
        likelihoods = np.log(shares / shares.sum(axis=1, keepdims=True)) @ opened[cell]
        raws["profile"][cell] = -likelihoods.max() / n_open[cell] if n_open[cell] else np.nan
    for name, of_cells in raws.items():
        has_one = ~np.isnan(of_cells)
        raw, depth = of_cells[has_one], np.log1p(n_open[has_one])
        slope, intercept = np.polyfit(depth, raw, 1)
        trend = model.known.trends[name]
        assert (trend.slope, trend.intercept) == pytest.approx((slope, intercept), rel=2e-2, abs=2e-2), name
        spread = np.std(raw - intercept - slope * depth, ddof=2)
        assert trend.spread == pytest.approx(spread, rel=1e-2), name
    assert model.known.n_calib == labelled.sizes["calib"]


def test_trends_of_a_part_of_the_training_cells_are_of_what_is_said_of_these(pooled, tmp_path, monkeypatch):
    monkeypatch.setattr(confidence_fit, "MOST_CELLS", 13)
    store = store_of(tmp_path / "a.zarr", 30, own=0.4, other=0.3)
    model = read_model(finetune(store, pooled, "few", tmp_path / "run", linear()).model)
    labelled = split_cells(store, "few", SplitRule(0.2, 0.1, 0.1, 0)).with_val_training()
    training = labelled.of("train")
    codes = labelled.codes_of(training)
    hashes = cell_hashes(store.obs([]).iloc[training], 0)
    looked_at = np.zeros(len(training), bool)
    for code in range(2):
        of_type = np.flatnonzero(codes == code)
        looked_at[of_type[np.argsort(hashes[of_type])[:13]]] = True
    assert looked_at.sum() == 26 < len(training)
    n_open = store.read(training).to_csr(store.n_islands)[:, model.vocabulary.islands].getnnz(axis=1)
    temperature = model.info.temperature
    said = probe_of(pooled, store, training, codes).logits
    energy = -temperature * np.log(np.exp(said / temperature).sum(axis=1))
    slope, intercept = np.polyfit(np.log1p(n_open[looked_at]), energy[looked_at], 1)
    trend = model.known.trends["energy"]
    assert (trend.slope, trend.intercept) == pytest.approx((slope, intercept), rel=2e-2, abs=2e-2)


def test_held_out_cells_are_those_of_training_out_of_fold_too_and_report_where_there_are_no_others(
    pooled, tmp_path
):
    store = store_of(tmp_path / "a.zarr", 30, own=0.4, other=0.3)
    how = {"model": pooled, "labels": "few", "out": tmp_path / "run", "head": "linear", "holdout": 0}
    report = api.finetune(store.path, **how, settings=["calibration_share=0"])
    assert report.split == {"train": 60, "val": 0, "calib": 0, "test": 0}
    labelled = split_cells(store, "few", SplitRule(0, 0.1, 0, 0)).with_val_training()
    training = labelled.of("train")
    codes = labelled.codes_of(training)
    probe = probe_of(pooled, store, training, codes)
    rows = pd.read_parquet(tmp_path / "run" / "heldout.parquet")
    assert rows["barcode"].tolist() == store.obs([])["barcode"].iloc[training].tolist()
    assert set(rows["split"]) == {"train"}
    assert rows["truth"].tolist() == [report.types[code] for code in codes]
    chances = softmax(probe.logits / report.temperature, axis=1)
    np.testing.assert_allclose(np.stack(rows["probabilities"].to_list()), chances, atol=1e-3)
    values = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (values["split"], values["n_cells"]) == ("train", 60)
    assert values["accuracy"] == pytest.approx(report.figures["accuracy"])
    assert "each as judged by a fit that left it out" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("labels_a_type", [5, 10, 50])
def test_with_few_labels_the_linear_head_is_the_default_and_the_model_predicts(
    pooled, tmp_path, labels_a_type
):
    store = store_of(tmp_path / "a.zarr", labels_a_type)
    progress = Lines()
    report = api.finetune(store.path, model=pooled, labels="few", out=tmp_path / "run", progress=progress)
    assert report.head == "linear"
    assert any(line.startswith("head linear: ") for line in progress.lines)
    done = api.predict(store.path, model=report.model, out=tmp_path / "labels")
    assert done.n_cells == 600
    found = api.evaluate(tmp_path / "labels", store=store.path, truth="cell_type", cells="all")
    assert found.best.accuracy > 0.95


def test_the_head_that_is_asked_for_is_trained(pooled, tmp_path):
    store = store_of(tmp_path / "a.zarr", 50)
    report = api.finetune(
        store.path, model=pooled, labels="few", out=tmp_path / "run", head="pooled", epochs=1
    )
    assert report.head == "pooled"
    assert report.judged_on == "val"


@pytest.mark.parametrize(
    ("asked", "head"),
    [
        ({"settings": ["linear_up_to=71"]}, "pooled"),
        ({"settings": ["linear_up_to=72", "train.seed=3", "class_weights=none"]}, "linear"),
        ({"epochs": 1}, "pooled"),
        ({"freeze_encoder": True}, "pooled"),
        ({"settings": ["label_smoothing=0.1"]}, "pooled"),
        ({"settings": ["head.island_dropout=0.1"]}, "pooled"),
    ],
    ids=str,
)
def test_up_to_so_many_cells_that_train_the_head_is_fitted_unless_training_was_asked_for(
    pooled, tmp_path, asked, head
):
    """Of 100 labelled cells 64 train, and 8 of val where it is fitted."""
    store = store_of(tmp_path / "a.zarr", 50)
    report = api.finetune(store.path, model=pooled, labels="few", out=tmp_path / "run", **asked)
    assert report.head == head


def test_five_cells_a_type_are_too_few_to_train_a_head_which_the_message_says(pooled, tmp_path):
    store = store_of(tmp_path / "a.zarr", 5)
    with pytest.raises(
        InputError, match="to hold any out for validation: found 2 types in 10 cells; use --head lin"
    ):
        api.finetune(store.path, model=pooled, labels="few", out=tmp_path / "run", head="pooled")


def test_a_type_with_one_cell_is_fitted(pooled, tmp_path):
    store = store_of(tmp_path / "a.zarr", 10)
    labels = store.obs(["few"])["few"].astype(object)
    rare = int(np.flatnonzero(labels.isna())[0])
    labels[rare] = "rare"
    store = write_store(
        tmp_path / "b.zarr",
        {
            "s0": replace(
                draw_cells(600, seed=5), obs=draw_cells(600, seed=5).obs.assign(few=labels.to_numpy())
            )
        },
    )
    report = finetune(store, pooled, "few", tmp_path / "run", linear())
    assert report.types == ("astro", "neuron", "rare")


def test_a_column_of_something_else_is_refused(atlas, pooled, tmp_path):
    cells = draw_cells(100)
    numbers = replace(cells, obs=cells.obs.assign(depth=np.arange(100)))
    store = write_store(tmp_path / "a.zarr", {"s0": numbers})
    message = (
        "to cross-validate the linear head: found 100 types in 100 cells; is this a column of cell types"
    )
    with pytest.raises(InputError, match=message):
        finetune(store, pooled, "depth", tmp_path / "run", linear())
    assert not (tmp_path / "run").exists()


def test_the_same_seed_gives_the_same_bits_also_after_a_run_that_was_killed(pooled, tmp_path, monkeypatch):
    store = store_of(tmp_path / "a.zarr", 10)
    expected = finetune(store, pooled, "few", tmp_path / "undisturbed", linear())

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("annatac_scale.train.finetune.write_model", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(store, pooled, "few", tmp_path / "run", linear())
    monkeypatch.undo()
    report = finetune(store, pooled, "few", tmp_path / "run", linear())
    assert replace(report, model=expected.model) == expected
    assert files_of(report.model) == files_of(expected.model)


def test_without_a_pretrained_pooled_layer_it_is_an_svd_of_the_cells_that_do_not_judge(pretrained, tmp_path):
    """Other test and calib cells, the same model: whatever they hold, it does not enter the weights."""
    store = store_of(tmp_path / "a.zarr", 60)
    labelled = split_cells(store, "few", SplitRule(0.2, 0.1, 0.1, 0))
    apart = np.concatenate([labelled.of("test"), labelled.of("calib")])
    levels = draw_cells(600, seed=5).levels.copy()
    levels[apart] = 0
    levels[apart, ::2] = 5
    cells = replace(draw_cells(600, seed=5), levels=levels, obs=store.samples["s0"].obs())
    changed = write_store(tmp_path / "b.zarr", {"s0": cells})
    config = linear(8, "gate")
    reports = [
        finetune(one, pretrained, "few", tmp_path / name, config)
        for name, one in (("one", store), ("two", changed))
    ]
    weights = [files_of(report.model)["weights.safetensors"] for report in reports]
    assert weights[0] == weights[1]
    assert read_model(reports[0].model).info.head.reads == "none"
    assert reports[0].test["accuracy"] > 0.9


def test_with_groups_the_svd_is_of_cells_of_groups_that_train(pretrained, tmp_path):
    """Other cells without a label, the same model, unless they are of donors that train."""
    donors = np.array([f"D{number % 8}" for number in range(600)], object)
    donors[550:] = None
    store = store_of(tmp_path / "a.zarr", 60, batch=donors)
    labelled = split_cells(store, "few", SplitRule(0.2, 0.1, 0.1, 0, "batch"))
    trains = np.isin(donors.astype(str), labelled.groups_of("train"))
    unlabelled = np.full(600, True)
    unlabelled[labelled.cells] = False
    weights = []
    for name, changed in (("a", None), ("b", unlabelled & ~trains), ("c", unlabelled & trains)):
        if changed is not None:
            cells = draw_cells(600, seed=5)
            cells.levels[changed] = 0
            cells.levels[changed, ::2] = 5
            store = write_store(
                tmp_path / f"{name}.zarr", {"s0": replace(cells, obs=store.samples["s0"].obs())}
            )
        report = finetune(store, pretrained, "few", tmp_path / name, linear(8), group="batch")
        weights.append(files_of(report.model)["weights.safetensors"])
    assert weights[0] == weights[1] != weights[2]
    n_beside = int((unlabelled & trains).sum())
    said = f"idf and SVD of the {report.split['train']} training cells and {n_beside} cells in no split, without labels"
    assert said in (report.model / "README.md").read_text()


def test_a_probe_reads_the_frozen_encoder_where_the_pooled_layer_does(atlas, tmp_path):
    asked = {"objective": "vector", "reads": "gate", "mask_fraction": 0.5, "pooled": 6}
    model = pretrain(atlas, tmp_path / "pre", small_pretraining(1, **asked)).model
    store = store_of(tmp_path / "a.zarr", 10)
    report = api.finetune(store.path, model=model, labels="few", out=tmp_path / "run")
    before, after = read_model(model), read_model(report.model)
    assert (report.head, after.info.head.reads) == ("linear", "gate")
    old, new = before.encoder.linformer.state_dict(), after.encoder.linformer.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert torch.equal(before.encoder.pool.gate.weight, after.encoder.pool.gate.weight)


def test_what_training_alone_can_do_is_refused_for_a_head_that_is_fitted():
    for setting in ({"lora": 4}, {"label_smoothing": 0.1}):
        with pytest.raises(ConfigError, match="head linear: found lora or label_smoothing, expected neither"):
            small_finetuning("linear", **setting)


def test_val_groups_judge_the_probe_and_folds_are_of_groups(pooled, tmp_path):
    donors = [f"D{number % 8}" for number in range(600)]
    store = store_of(tmp_path / "a.zarr", 40, batch=donors)
    progress = Lines()
    report = finetune(store, pooled, "few", tmp_path / "run", linear(), progress=progress, group="batch")
    assert report.judged_on == "val"
    assert report.split["val"] > 0
    line = next(line for line in progress.lines if line.startswith("linear head: "))
    assert "over 4 folds of the training batch groups" in line
