"""What fine-tuning keeps of known cells equals what single cells give, and the right split is used for each of it."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from planted import Lines, small_finetuning
from scipy.special import softmax
from sklearn.covariance import ledoit_wolf

from annatac_scale.annotate.predict import predict
from annatac_scale.errors import ConfigError
from annatac_scale.model.calibration import VECTOR_CELLS, expected_calibration_error
from annatac_scale.model.folder import read_model
from annatac_scale.model.novelty import DISTANCES, SCORES, TRENDED, Outputs
from annatac_scale.train import confidence_fit
from annatac_scale.train.confidence_fit import fit_scaling, means_and_whitening
from annatac_scale.train.finetune import finetune
from annatac_scale.train.presets import finetune_preset


def one_by_one(model, store, cells):
    """Logits, embeddings and n_open of each cell alone; attend open."""
    number = {island: i for i, island in enumerate(model.vocabulary.islands.tolist())}
    logits, embedding, n_open = [], [], []
    for row in store.read(cells).to_csr(store.n_islands).toarray():
        listed = [island for island in np.flatnonzero(row).tolist() if island in number]
        tokens = torch.tensor([int(row[island]) for island in listed], dtype=torch.int64)
        islands = torch.tensor([number[island] for island in listed], dtype=torch.int64)
        offsets = torch.tensor([0, len(listed)])
        with torch.no_grad():
            z = model.typer.head.embed(
                model.encoder.linformer(tokens, islands, offsets), tokens, islands, offsets
            )
            logits.append(model.typer.head.classifier(z)[0].numpy())
        embedding.append(z[0].numpy())
        n_open.append(len(listed))
    return np.array(logits, float), np.array(embedding, float), np.array(n_open)


def opened_of(model, store, split, name):
    """Open islands of the cells of a split, by the model's numbers."""
    rows = store.read(np.flatnonzero(split == name)).to_csr(store.n_islands).toarray()
    return [np.flatnonzero(row).tolist() for row in rows[:, model.vocabulary.islands]]


def outputs_of(tuned, name):
    """What the model says of the cells of a split, with how well they fit the profiles."""
    model, said, _, opened = tuned
    logits, embedding, n_open, _ = said[name]
    shares = model.known.profiles.log_shares
    fit = [
        max(np.mean([column[i] for i in islands]) for column in shares.T) if islands else np.nan
        for islands in opened[name]
    ]
    return Outputs(logits.astype(np.float32), embedding.astype(np.float32), n_open, np.array(fit))


@pytest.fixture(scope="module")
def tuned(atlas, pretrained, tmp_path_factory):
    """A fine-tuned model, what it says of each cell of each split alone, its run folder, and these cells' islands."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    model = read_model(finetune(atlas, pretrained, "cell_type", run, small_finetuning("cnn", 2)).model)
    split = pq.read_table(run / "split.parquet").to_pandas()["split"].to_numpy(str)
    types = atlas.obs(["cell_type"])["cell_type"].to_numpy(str)
    codes = np.array([model.info.labels.index(name) for name in types])
    said, opened = {}, {}
    for name in ("train", "val", "calib", "test"):
        cells = np.flatnonzero(split == name)
        said[name] = (*one_by_one(model, atlas, cells), codes[cells])
        opened[name] = opened_of(model, atlas, split, name)
    return model, said, run, opened


def test_profiles_are_the_shares_of_islands_among_those_open_in_training_cells(tuned):
    model, said, _, opened = tuned
    n_islands, codes = len(model.vocabulary), said["train"][3].tolist()
    counts = [[0] * n_islands for _ in range(2)]
    for islands, code in zip(opened["train"], codes, strict=True):
        for island in islands:
            counts[code][island] += 1
    everywhere = [a + b + 0.5 for a, b in zip(*counts, strict=True)]
    for code in range(2):
        lent = [200 * n / sum(everywhere) for n in everywhere]
        own = np.add(counts[code], lent)
        found = np.exp(model.known.profiles.log_shares[:, code].astype(float))
        np.testing.assert_allclose(found, own / own.sum(), rtol=1e-4)


def test_the_calib_cells_scores_are_those_of_each_alone(tuned):
    model, said, _, _ = tuned
    logits, _, n_open, codes = said["calib"]
    known, temperature = model.known, model.info.temperature
    assert known.n_calib == len(codes) > 20
    assert known.codes.tolist() == codes.tolist()
    assert known.n_open.tolist() == n_open.tolist()
    chances = softmax(logits / temperature, axis=1)
    np.testing.assert_allclose(known.chances, chances[np.arange(len(codes)), codes], atol=1e-4)
    expected = {
        "max_probability": 1 - chances.max(axis=1),
        "energy": -temperature * np.log(np.exp(logits / temperature).sum(axis=1)),
    }
    above = {}
    for name in TRENDED:
        trend = known.trends[name]
        depth = np.clip(np.log1p(n_open), trend.low, trend.high)
        raw = known.raw(name, outputs_of(tuned, "calib"), temperature)
        around = trend.spread * np.exp(-trend.narrowing * depth)
        above[name] = (raw - trend.intercept - trend.slope * depth) / around
    expected |= {name: above[name] for name in DISTANCES} | {"joint": above["energy"] + above["profile"]}
    for name, scores in expected.items():
        np.testing.assert_allclose(known.scores[name], scores, rtol=1e-2, atol=1e-2, err_msg=name)


def test_means_are_of_training_cells_and_trends_of_val_cells(tuned):
    model, said, _, _ = tuned
    _, embedding, _, codes = said["train"]
    means = np.stack([embedding[codes == code].mean(axis=0) for code in range(2)])
    np.testing.assert_allclose(model.known.means, means, rtol=1e-3, atol=1e-4)
    n_open = said["val"][2]
    assert model.known.trends.keys() == set(TRENDED)
    for name, trend in model.known.trends.items():
        raw = model.known.raw(name, outputs_of(tuned, "val"), model.info.temperature)
        seen = ~np.isnan(raw)  # a cell without open islands fits no profile
        depth = np.log1p(n_open[seen])
        slope, intercept = np.polyfit(depth, raw[seen], 1)
        assert (trend.slope, trend.intercept) == pytest.approx((slope, intercept), rel=1e-2, abs=1e-2)
        assert (trend.low, trend.high) == pytest.approx((depth.min(), depth.max()))


def test_stored_cells_are_training_cells_at_most_so_many_of_a_type(atlas, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(confidence_fit, "REFERENCES", 9)
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", small_finetuning("cnn", 1))
    model = read_model(report.model)
    split = pq.read_table(tmp_path / "run" / "split.parquet").to_pandas()["split"].to_numpy(str)
    _, embedding, _ = one_by_one(model, atlas, np.flatnonzero(split == "train"))
    assert len(model.known.references) == 18
    nearest = [np.abs(embedding - one).max(axis=1).min() for one in model.known.references]
    assert max(nearest) < 1e-4
    assert np.bincount(model.known.reference_codes).tolist() == [9, 9]
    cells = np.flatnonzero(split == "train")
    types = atlas.obs(["cell_type"])["cell_type"].to_numpy(str)[cells]
    of_which = [np.abs(embedding - one).max(axis=1).argmin() for one in model.known.references]
    assert types[of_which].tolist() == [model.info.labels[code] for code in model.known.reference_codes]


def test_calibration_errors_stand_in_the_folder_and_on_the_card(tuned):
    model, said, run, _ = tuned
    found = model.info.calibration_errors
    for name in ("calib", "test"):
        logits, _, _, codes = said[name]
        for when, temperature in (("before", 1.0), ("after", model.info.temperature)):
            chances = softmax(logits / temperature, axis=1)
            assert found[name][when] == pytest.approx(expected_calibration_error(chances, codes), abs=1e-3)
    assert json.loads((run / "model" / "calibration.json").read_text())["calibration_errors"] == found
    assert model.info.provenance["calibration"] == {"kind": "temperature", "errors": found}
    shown = f"{found['test']['before']:.3f} -> {found['test']['after']:.3f} (test)"
    assert shown in (run / "model" / "README.md").read_text()


def test_without_calib_cells_a_model_keeps_no_scores_but_its_measures(atlas, pretrained, tmp_path):
    config = small_finetuning("pooled", 1, calibration_share=0.0)
    model = read_model(finetune(atlas, pretrained, "cell_type", tmp_path / "run", config, 0).model)
    assert model.known.n_calib == 0
    assert len(model.known.references) > 0
    assert model.info.calibration_errors == {}


def test_vector_scaling_is_fitted_where_val_is_large_and_else_says_for_which_types_not(
    atlas, pretrained, tmp_path
):
    lines = Lines()
    config = small_finetuning("pooled", 1, calibration="vector", validation_share=0.4)
    model = read_model(finetune(atlas, pretrained, "cell_type", tmp_path / "a", config, progress=lines).model)
    assert len(model.info.scales) == len(model.info.biases) == 2
    assert not any("calibration=vector" in line for line in lines.lines)
    config = small_finetuning("pooled", 1, calibration="vector", validation_share=0.05)
    model = read_model(finetune(atlas, pretrained, "cell_type", tmp_path / "b", config, progress=lines).model)
    assert model.info.scales == ()
    (line,) = [line for line in lines.lines if "calibration=vector" in line]
    assert f"expected {VECTOR_CELLS} of each type; the temperature alone scales 2 of 2 types" in line


def test_a_models_own_novelty_rule_comes_from_the_settings(atlas, pretrained, tmp_path):
    config = small_finetuning("pooled", 1, novelty="mahalanobis", novel_rate=0.1)
    info = read_model(finetune(atlas, pretrained, "cell_type", tmp_path / "run", config).model).info
    assert (info.novelty, info.novel_rate, info.novel_threshold) == ("mahalanobis", 0.1, 0.5)


def test_the_presets_take_a_rate_of_joint_and_the_paper_one_of_its_confidence():
    found = {name: finetune_preset(name) for name in ("tiny", "small", "paper")}
    assert {name: config.novelty for name, config in found.items()} == {
        "tiny": "joint",
        "small": "joint",
        "paper": "max_probability",
    }
    assert {(config.novel_rate, config.novel_threshold) for config in found.values()} == {(None, 0.5)}


def test_the_stored_scores_are_those_that_predict_gives_the_calib_cells(tuned, atlas, tmp_path):
    model, _, run, _ = tuned
    split = pq.read_table(run / "split.parquet").to_pandas()["split"].to_numpy(str)
    for name in SCORES:
        predict(atlas, run / "model", tmp_path / name, novelty=name, novel_rate=0.2)
        told = pq.read_table(tmp_path / name).to_pandas()
        calib = told["novelty_score"].to_numpy()[split == "calib"]
        np.testing.assert_allclose(calib, model.known.scores[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_rate_that_is_too_rare_for_the_calib_cells_leaves_the_papers_rule_and_says_so(
    atlas, pretrained, tmp_path
):
    lines = Lines()
    config = small_finetuning("pooled", 1, novelty="knn", novel_rate=0.01)
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", config, progress=lines)
    info = read_model(report.model).info
    assert (info.novelty, info.novel_rate) == ("knn", None)
    (line,) = [line for line in lines.lines if "novel_rate=0.01" in line]
    assert f"found {report.split['calib']} calib cells, expected at least 99" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "isotonic"}, "calibration: found 'isotonic', expected temperature or vector"),
        ({"novelty": "entropy", "novel_rate": 0.1}, "novelty score: found 'entropy'"),
        ({"novel_rate": 0.0}, r"found 0\.5, 0\.0, expected shares"),
        ({"novel_threshold": 1.5}, r"found 1\.5, None, expected shares"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        small_finetuning("pooled", 1, **options)


def test_another_calibration_is_refused():
    with pytest.raises(ConfigError, match="calibration: found 'isotonic'"):
        fit_scaling(np.zeros((2, 2), np.float32), np.array([0, 1]), "isotonic")


def test_the_whitening_makes_the_shrunk_spread_within_types_the_identity():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 3, 60)
    embedding = (rng.normal(size=(60, 8)) * np.arange(1, 9) + 5 * codes[:, None]).astype(np.float32)
    means, whitening = means_and_whitening(embedding, codes, 3)
    off = embedding.astype(float) - np.stack([embedding[codes == c].mean(axis=0) for c in range(3)])[codes]
    shrunk, _ = ledoit_wolf(off, assume_centered=True)
    np.testing.assert_allclose(whitening.T @ shrunk @ whitening, np.eye(8), atol=1e-4)
    assert means.dtype == whitening.dtype == np.float32


@pytest.mark.parametrize("n", [1, 4])
def test_few_cells_and_directions_without_a_spread_have_a_whitening(n):
    embedding = np.repeat(np.eye(3, 5, dtype=np.float32), n, axis=0)
    embedding[:, 0] += np.tile(np.arange(n, dtype=np.float32), 3)
    _, whitening = means_and_whitening(embedding, np.repeat([0, 1, 2], n), 3)
    assert np.isfinite(whitening).all()
