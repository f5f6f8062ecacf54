"""The loss of fine-tuning, and what of the encoder is trained by it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import StopAfter, files_of, small_finetuning, small_pretraining

from annatac_scale.errors import ConfigError
from annatac_scale.model.cell_typer import CellTyper, build_head
from annatac_scale.model.folder import read_model
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.train.cell_type_task import CellTypeModel
from annatac_scale.train.finetune import finetune
from annatac_scale.train.pretrain import pretrain
from annatac_scale.train.splits import SplitRule, split_cells

QUICK = {"learning_rate": 3e-2, "table_learning_rate": 1e-2, "encoder_learning_rate": 1e-2}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_weighted_cross_entropy_with_smoothed_targets(atlas, pretrained, smoothing):
    model = read_model(pretrained)
    labelled = split_cells(atlas, "cell_type", SplitRule(0.2, 0.1, 0.1, 0))
    head = build_head(small_finetuning("cnn").head, model.info.encoder, len(model.vocabulary), 2)
    weights = np.random.default_rng(0).uniform(0.1, 3, 400).astype(np.float32)
    module = CellTypeModel(CellTyper(model.encoder.linformer, head), weights, labelled, smoothing)
    cells = np.array([3, 40, 41, 350])
    rows = atlas.read(cells).renumber(model.vocabulary.new_of_old())
    batch = TokenLister(atlas, model.vocabulary, "open")(Batch.from_open(cells, rows))
    logits = module.typer.predict(batch).astype(float)
    found = module(batch)["type"]
    truth = (atlas.obs(["cell_type"])["cell_type"].to_numpy(str)[cells] == "neuron").astype(int)
    expected = 0.0
    for row, cell, own in zip(logits, cells, truth, strict=True):
        chances = np.exp(row) / np.exp(row).sum()
        target = np.full(2, smoothing / 2)
        target[own] += 1 - smoothing
        expected -= weights[cell] * (target * np.log(chances)).sum()
    assert found.sum.item() == pytest.approx(expected, rel=1e-5)
    assert found.count.item() == 4
    assert found.correct.item() == (logits.argmax(1) == truth).sum()


def test_smoothed_targets_make_less_sure_models(atlas, pretrained, tmp_path):
    confidence = []
    for smoothing in (0.0, 0.4):
        config = small_finetuning(epochs=8, label_smoothing=smoothing, **QUICK)
        report = finetune(atlas, pretrained, "cell_type", tmp_path / str(smoothing), config)
        confidence.append(report.temperature)
        assert report.test["accuracy"] >= 0.95
    assert confidence[1] < confidence[0]


def test_adapters_are_merged_into_the_model_that_is_written(atlas, pretrained, tmp_path):
    config = small_finetuning("cnn", 4, lora=2, **QUICK)
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", config)
    before, after = (read_model(path).encoder.linformer for path in (pretrained, report.model))
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"layers.0.attention.{name}.weight" for name in ("query", "key", "value", "output")}
    for name in changed:
        assert torch.linalg.matrix_rank(new[name] - old[name], rtol=1e-4) <= 2
    assert report.test["accuracy"] >= 0.95


def test_adapters_are_resumed_to_the_same_bits(atlas, pretrained, tmp_path):
    config = small_finetuning("cnn", 3, lora=2)
    expected = finetune(atlas, pretrained, "cell_type", tmp_path / "undisturbed", config)
    with pytest.raises(KeyboardInterrupt):
        finetune(atlas, pretrained, "cell_type", tmp_path / "run", config, progress=StopAfter(2))
    report = finetune(atlas, pretrained, "cell_type", tmp_path / "run", config)
    assert files_of(report.model) == files_of(expected.model)


def test_adapters_want_an_encoder_that_is_trained_and_read(atlas, pretrained, tmp_path):
    config = small_finetuning(lora=2)
    unread = replace(config, head=replace(config.head, reads="none"))
    with pytest.raises(ConfigError, match="lora: found 2 under a head that does not read the Linformer"):
        finetune(atlas, pretrained, "cell_type", tmp_path / "run", unread)
    asked = {"objective": "vector", "reads": "none", "mask_fraction": 0.5}
    untrained = pretrain(atlas, tmp_path / "pre", small_pretraining(1, **asked)).model
    with pytest.raises(
        ConfigError, match="lora: the head reads the Linformer, which pretraining did not train"
    ):
        finetune(atlas, untrained, "cell_type", tmp_path / "other", small_finetuning("cnn", lora=2))
    with pytest.raises(ConfigError, match="lora: found 2 with --freeze-encoder, expected one of both"):
        replace(config, freeze_encoder=True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing: found 1.0, expected at least 0 and under 1"),
        ({"lora": -1}, "lora, linear_up_to: found -1, 0, expected at least 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        small_finetuning(**setting)
