import itertools
import json
import math
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import Lines, StopAfter, draw_cells, small_pretraining, write_store
from torch import nn

from annatac_scale.errors import AnnatacError, ConfigError
from annatac_scale.model.heads import LossSum
from annatac_scale.progress import Silent
from annatac_scale.stream.batch import Batch
from annatac_scale.train import loop as loop_module
from annatac_scale.train.checkpoint import Checkpoints
from annatac_scale.train.loop import (
    MOST_SKIPPED,
    Loop,
    accumulate,
    micro_batches,
    train,
)
from annatac_scale.train.pretrain import PretrainData, pretrain, pretrain_task
from annatac_scale.train.ranks import Ranks
from annatac_scale.train.record import Record
from annatac_scale.train.run_folder import RunFolder
from annatac_scale.train.run_options import RunOptions
from annatac_scale.train.train_options import TrainOptions, rate_factor, uses_bf16

ALONE = Ranks(device=torch.device("cpu"))


def batch_of(counts):
    """A batch of cells with the given numbers of tokens."""
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    islands = np.concatenate([np.empty(0, np.int32), *[np.arange(n, dtype=np.int32) for n in counts]])
    return Batch(np.arange(len(counts)) + 100, offsets, islands, np.ones(len(islands), np.uint8))


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 25))
def test_micro_batches_cover_every_cell_once_in_order_within_the_limit(counts, limit):
    batch = batch_of(counts)
    pieces = list(micro_batches(batch, limit))
    assert np.concatenate([piece.cell_ids for piece in pieces]).tolist() == batch.cell_ids.tolist()
    assert [n for piece in pieces for n in np.diff(piece.offsets).tolist()] == counts
    assert np.concatenate([piece.islands for piece in pieces]).tolist() == batch.islands.tolist()
    for piece in pieces:
        assert len(piece.islands) <= limit or len(piece) == 1
        assert len(piece) or not counts
    # No piece could have taken the next cell too.
    for piece, following in itertools.pairwise(pieces):
        assert len(piece.islands) + following.offsets[1] > limit


def test_an_empty_batch_is_one_empty_piece():
    assert [len(piece) for piece in micro_batches(batch_of([]), 10)] == [0]


@given(st.integers(0, 400), st.integers(1, 9), st.integers(0, 30))
def test_the_rate_of_schedule_step_is_the_formula(step, steps_per_epoch, warmup):
    options = TrainOptions(epochs=50, schedule="step", decay=0.5, decay_epochs=3, warmup_steps=warmup)
    expected = 1.0
    for epoch in range(1, step // steps_per_epoch + 1):
        if epoch % 3 == 0:
            expected *= 0.5
    if step < warmup:
        expected *= (step + 1) / (warmup + 1)
    assert rate_factor(options, step, steps_per_epoch) == pytest.approx(expected)


def test_the_rate_of_schedule_cosine_falls_from_one_to_zero_over_all_epochs():
    options = TrainOptions(epochs=4, schedule="cosine")
    factors = [rate_factor(options, step, 10) for step in range(41)]
    assert factors[0] == 1
    assert factors[20] == pytest.approx(0.5)
    assert factors[10] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert factors[40] == pytest.approx(0)
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("schedule", "linear"), ("epochs", 0), ("global_batch_size", 0), ("micro_tokens", 0), ("patience", 0),
        ("precision", "fp16"), ("min_steps", -1),
        ("learning_rate", 0.0), ("table_learning_rate", float("nan")), ("clip", -1.0), ("decay", 0.0),
        ("weight_decay", -0.1), ("warmup_steps", -1), ("seed", -1), ("lanes", -2), ("min_gain", float("nan")),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=f"{option}: found .*expected"):
        TrainOptions(**{option: value})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("loop") / "a.zarr", {"s0": draw_cells(120)})


def pretraining_of(store, config):
    """Task and data of a pretraining, in float64."""
    data = PretrainData.of(store, config, Silent())
    torch.manual_seed(0)
    task = pretrain_task(data, config, ALONE)
    task.module.double()
    with torch.no_grad():
        task.module.encoder.linformer.positions.normal_()
    return task, data


def accumulated(task, batch, options):
    """Losses and, in the module, gradients of a prepared batch."""
    counts = task.counts(batch)
    targets = [float(counts[name]) for name in task.loss_weights]
    return accumulate(task.module, task, batch, options, ALONE, targets)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("attend", ["open", "all"])
@pytest.mark.parametrize("micro_tokens", [1, 70, 500, 3000])
def test_micro_steps_of_any_size_give_the_gradient_of_one_big_batch(store, attend, micro_tokens):
    config = small_pretraining(attend=attend, global_batch_size=40)
    task, data = pretraining_of(store, config)
    batch = task.prepare(next(iter(data.stream(data.training, config.train, ALONE))), 0)
    options = replace(config.train, micro_tokens=micro_tokens)
    totals = accumulated(task, batch, options)
    found = gradients(task.module)
    task.module.zero_grad()

    losses = task.module(batch)
    sum(loss.sum / loss.count for loss in losses.values()).backward()
    expected = gradients(task.module)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6, msg=name)
    for name, loss in losses.items():
        assert totals[name].sum == pytest.approx(loss.sum.item())
        assert (totals[name].count, totals[name].correct) == (loss.count.item(), loss.correct.item())


def test_a_batch_without_cells_gives_a_gradient_of_zeros_to_every_weight(store):
    config = small_pretraining()
    task, data = pretraining_of(store, config)
    batch = next(iter(data.stream(data.training, config.train, ALONE)))[0:0]
    totals = accumulated(task, task.prepare(batch, 0), config.train)
    assert {name: (t.sum, t.count) for name, t in totals.items()} == {"level": (0, 0), "open": (0, 0)}
    for name, gradient in gradients(task.module).items():
        assert not gradient.any(), name


class Scale(nn.Module):
    """One weight w; the loss of a cell is w times its tokens, or not a number for cells that are broken."""

    def __init__(self, broken):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.broken = broken

    def forward(self, batch):
        loss = self.weight * float(np.diff(batch.offsets).sum())
        loss = loss * (math.nan if np.isin(batch.cell_ids, self.broken).any() else 1)
        return {"it": LossSum(loss, torch.tensor(len(batch)), torch.tensor(0))}


class ScaleTask:
    """Trains ``Scale``; the scores of the validations are given."""

    def __init__(self, scores, broken=()):
        self.loss_weights = {"it": 1.0}
        self.module = Scale(list(broken))
        self.scores = iter(scores)
        self.weights = []

    def parameter_groups(self, options):
        return [{"params": list(self.module.parameters()), "lr": options.learning_rate}]

    def prepare(self, batch, epoch):
        return batch

    def counts(self, batch):
        return {"it": len(batch)}

    def validate(self, ranks, after_batch):
        self.weights.append(self.module.weight.item())
        return {"score": next(self.scores)}


def train_scale(store, tmp_path, task, how=None, progress=None, **options):
    config = small_pretraining(**{"epochs": 9, **options})
    progress = progress or Silent()
    data = PretrainData.of(store, config, Silent())
    run = RunFolder(tmp_path / "run", config, {})
    stream = data.stream(data.training, config.train, ALONE)
    with (
        run.use(progress.say),
        Record.of(run, store, how or RunOptions(), ALONE, progress) as record,
    ):
        return train(Loop(task, stream, config.train, ALONE, record, progress), lambda: None)


def test_training_stops_when_patience_ends_and_leaves_the_best_weights(store, tmp_path):
    task = ScaleTask([0.1, 0.5, 0.5005, 0.3, 0.5009, 0.9])
    figures = train_scale(store, tmp_path, task, patience=3, min_gain=1e-3)
    # The third and fifth score gain less than min_gain over the second; the fifth is the best all the same.
    assert len(task.weights) == 5
    assert figures == {"score": 0.5009, "epoch": 5}
    assert task.module.weight.item() == pytest.approx(task.weights[4])
    assert len(set(task.weights)) == 5


def test_training_goes_on_to_the_last_epoch_while_it_gains(store, tmp_path):
    task = ScaleTask(np.arange(9.0).tolist())
    assert train_scale(store, tmp_path, task, patience=2)["epoch"] == 9


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_cells(store, tmp_path):
    broken = (17, 80)
    data = PretrainData.of(store, small_pretraining(), Silent())
    assert np.isin(broken, data.training).all()
    names = r"cell (17|80): barcode cell0-\1 of sample s0"
    with pytest.raises(
        AnnatacError, match=rf"step \d+: the loss is not finite \({names}.*lower rate.*--on-nan skip"
    ):
        train_scale(store, tmp_path, ScaleTask([1.0], broken))


def test_steps_that_are_not_finite_are_left_out_counted_and_told_of(store, tmp_path):
    progress, broken = Lines(), (17, 80)
    task = ScaleTask([1.0, 2.0], broken)
    train_scale(
        store, tmp_path, task, RunOptions(on_nan="skip", log_steps=1), progress, epochs=2, global_batch_size=4
    )
    said = [line for line in progress.lines if "not finite" in line]
    # Each of the two cells comes once an epoch.
    assert [line.rpartition(", ")[2] for line in said] == [f"{n} so far" for n in range(1, len(said) + 1)]
    assert len(said) in (2, 4)
    assert math.isfinite(task.module.weight.item())
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in metrics
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert sum(line.get("skipped_steps", 0) for line in lines) == len(said)


def test_too_many_steps_in_a_row_that_are_not_finite_stop_the_run(store, tmp_path):
    task = ScaleTask([1.0] * 9, range(120))
    with pytest.raises(AnnatacError, match=f"in {MOST_SKIPPED + 1} steps in a row"):
        train_scale(store, tmp_path, task, RunOptions(on_nan="skip"), global_batch_size=4)


def test_validations_that_are_no_numbers_are_an_error_on_one_line(store, tmp_path):
    with pytest.raises(AnnatacError, match="no validation gave a number"):
        train_scale(store, tmp_path, ScaleTask([math.nan] * 9), patience=2)


def test_metrics_are_lines_of_json_with_losses_per_target(store, tmp_path):
    train_scale(store, tmp_path, ScaleTask([0.0] * 9), global_batch_size=4, patience=9)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "rate" in line]
    assert [line["step"] for line in steps] == list(range(20, 9 * 27, 20))
    assert {"it_loss", "it_accuracy", "cells_per_s", "epoch"} <= steps[0].keys()
    assert [line["validation_score"] for line in lines if "validation_score" in line] == [0.0] * 9


@pytest.mark.parametrize(("precision", "expected"), [("auto", False), ("fp32", False), ("bf16", True)])
def test_bf16_is_for_gpus_unless_it_is_asked_for(precision, expected):
    assert uses_bf16(precision, torch.device("cpu")) is expected


def test_bf16_trains_weights_that_stay_in_float32(store):
    config = small_pretraining(precision="bf16")
    data = PretrainData.of(store, config, Silent())
    torch.manual_seed(0)
    task = pretrain_task(data, config, ALONE)
    batch = task.prepare(next(iter(data.stream(data.training, config.train, ALONE))), 0)
    accumulated(task, batch, config.train)
    found = gradients(task.module)
    task.module.zero_grad()
    accumulated(task, batch, replace(config.train, precision="fp32"))
    for name, gradient in gradients(task.module).items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() <= 0.1 * gradient.norm() + 1e-6, name


def test_only_the_tables_decay_and_positions_are_trained_where_they_are_learned(store):
    for positions in ("frozen", "learned"):
        config = small_pretraining(positions=positions, weight_decay=0.25, table_learning_rate=3e-3)
        task, _ = pretraining_of(store, config)
        rest, tables = task.parameter_groups(config.train)
        encoder = task.module.encoder.linformer
        learned = [encoder.positions] if positions == "learned" else []
        assert [id(p) for p in tables["params"]] == [id(p) for p in (encoder.projection, *learned)]
        assert (tables["lr"], tables["weight_decay"]) == (3e-3, 0.25)
        assert rest["lr"] == config.train.learning_rate
        assert rest.get("weight_decay", 0.0) == 0.0
        grouped = {id(p) for group in (rest, tables) for p in group["params"]}
        assert grouped == {id(p) for p in task.module.parameters()}
        assert (id(encoder.positions) in grouped) == (positions == "learned")


def test_best_weights_are_those_of_the_lineage_wherever_a_run_ends(store, tmp_path, monkeypatch):
    save, saved = Checkpoints.save, []

    def save_and_stop(self, step, *arguments, **options):
        saved.append(step)
        if len(saved) == 4:
            raise KeyboardInterrupt
        save(self, step, *arguments, **options)

    scores = [0.1, 0.9, *[0.2] * 7]
    undisturbed = ScaleTask(scores)
    expected = train_scale(store, tmp_path / "undisturbed", undisturbed)
    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_scale(store, tmp_path, ScaleTask(scores))
    monkeypatch.undo()
    resumed = ScaleTask(scores[2:])
    assert train_scale(store, tmp_path, resumed) == expected == {"score": 0.9, "epoch": 2}
    assert resumed.module.weight.item() == undisturbed.module.weight.item() == undisturbed.weights[1]


def test_a_run_whose_best_weights_are_damaged_goes_on_and_finds_the_best_of_what_comes(store, tmp_path):
    scores = [0.9, *[0.1] * 8]
    with pytest.raises(KeyboardInterrupt):
        train_scale(store, tmp_path, ScaleTask(scores), RunOptions(keep=1), StopAfter(3))
    best, newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*.pt"))
    best.write_bytes(best.read_bytes()[:-50])
    progress = Lines()
    task = ScaleTask([0.3, 0.5, 0.2, 0.1, 0.1, 0.1])
    assert train_scale(store, tmp_path, task, progress=progress) == {"score": 0.5, "epoch": 5}
    assert any(f"of step {int(best.stem[5:])}, is damaged" in line for line in progress.lines)
    assert any(f"after {int(newest.stem[5:])} steps" in line for line in progress.lines)
    assert task.module.weight.item() == task.weights[1]


def test_freed_memory_goes_back_to_the_system_now_and_then_within_an_epoch(atlas, tmp_path, monkeypatch):
    times = []
    monkeypatch.setattr(loop_module, "give_back_freed_memory", lambda: times.append(1))
    monkeypatch.setattr(loop_module, "GIVE_BACK_EVERY_S", 0.0)
    pretrain(atlas, tmp_path / "often", small_pretraining(2))
    assert len(times) == 2 * 12 + 2  # each step, and each epoch
    times.clear()
    monkeypatch.setattr(loop_module, "GIVE_BACK_EVERY_S", 1e9)
    pretrain(atlas, tmp_path / "seldom", small_pretraining(2))
    assert len(times) == 2


@dataclass(frozen=True)
class TwoRanks(Ranks):
    """As if a second rank, at the same step, had twice of everything."""

    world_size: int = 2

    def sum(self, values):
        return [3 * value for value in values]


def test_the_time_waited_for_data_is_the_mean_over_the_ranks(store):
    config = small_pretraining(1)
    data = PretrainData.of(store, config, Silent())
    stream = data.stream(data.training, config.train, ALONE)
    loop = Loop(ScaleTask([]), stream, config.train, TwoRanks(device=torch.device("cpu")), None, Silent())
    counts = loop_module._counted(loop, batch_of([3, 2]), 0.5)
    assert counts.waited_s == pytest.approx((0.5 + 1.0) / 2)
    assert (counts.targets, counts.cells, counts.asked) == ([6.0], 6, 0)
    loop.asked.ask(signal.SIGTERM)
    assert loop_module._counted(loop, batch_of([3, 2]), 0.5).asked == signal.SIGTERM
