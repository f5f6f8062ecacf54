import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import files_of, small_pretraining
from together import CPU, Attempt, join, pretrain_together, started

from annatac_scale.progress import Silent
from annatac_scale.store.store import IslandStore
from annatac_scale.train.loop import accumulate
from annatac_scale.train.pretrain import PretrainData, pretrain, pretrain_folder, pretrain_task, report_of
from annatac_scale.train.ranks import Ranks
from annatac_scale.train.run_options import RunOptions

EPOCHS = 3


def config():
    return small_pretraining(EPOCHS, global_batch_size=32)


def gradients_of_first_batches(store, ranks):
    """Gradients in float64 of a full batch, then of the last batch of an epoch, of which a rank may have no cell."""
    data = PretrainData.of(store, config(), Silent(), ranks)
    torch.manual_seed(ranks.rank)
    task = pretrain_task(data, config(), ranks)
    task.module.double()
    with torch.no_grad():
        task.module.encoder.linformer.positions.normal_()
    module = ranks.parallel(task.module)
    # 360 cells in batches of 359: the second batch has one cell.
    options = replace(config().train, global_batch_size=359)
    found = []
    for batch in data.stream(data.training, options, ranks):
        task.module.zero_grad(set_to_none=False)
        prepared = task.prepare(batch, 0)
        counts = ranks.sum([float(n) for n in task.counts(prepared).values()])
        losses = accumulate(module, task, prepared, options, ranks, counts)
        grads = {name: p.grad.clone() for name, p in task.module.named_parameters()}
        found.append({"cells": len(batch), "grads": grads, "losses": {n: vars(x) for n, x in losses.items()}})
    return found


def first_batches(rank, world_size, folder, store_path):
    ranks = join(rank, world_size, folder / "meet")
    assert ranks.sum([1.0, float(rank)]) == [2.0, 1.0]
    assert ranks.gather(rank) == [0, 1]
    assert ranks.bytes_of_first(b"abc" if rank == 0 else None) == b"abc"
    assert ranks.bytes_of_first(None) is None
    assert ranks.sum_counts(np.array([2**60, rank])).tolist() == [2**61, 1]
    torch.save(gradients_of_first_batches(IslandStore.open(store_path), ranks), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_gradients_on_two_ranks_are_those_of_one_process(atlas, tmp_path):
    started(first_batches, (2, tmp_path, atlas.path), 2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    expected = gradients_of_first_batches(atlas, Ranks(device=CPU))
    assert [(a["cells"], b["cells"]) for a, b in zip(first, second, strict=True)] == [(179, 180), (0, 1)]
    for rank in (first, second):
        for found, one in zip(rank, expected, strict=True):
            for name, gradient in one["grads"].items():
                torch.testing.assert_close(found["grads"][name], gradient, atol=1e-6, rtol=1e-6, msg=name)
            for name, loss in one["losses"].items():
                assert found["losses"][name] == pytest.approx(loss, rel=1e-9)


@pytest.fixture(scope="module")
def alone(atlas, tmp_path_factory):
    """An undisturbed run in one process."""
    return pretrain(atlas, tmp_path_factory.mktemp("alone") / "run", config())


EVERY_STEP = RunOptions(log_steps=1, log_cells=True)
LONG = small_pretraining(17, global_batch_size=32, patience=99)
"""204 steps."""


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def loss_curve(run):
    names = ("level_loss", "open_loss", "open_accuracy")
    return [[line[name] for name in names] for line in metrics(run) if "rate" in line]


@pytest.fixture(scope="module")
def long_alone(atlas, tmp_path_factory):
    """204 steps in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    pretrain(atlas, run, LONG, options=EVERY_STEP)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_two_three_and_four_ranks_have_the_loss_curve_of_one_process(atlas, long_alone, tmp_path, world_size):
    pretrain_together(world_size, tmp_path, atlas, [Attempt(tmp_path / "run", LONG, EVERY_STEP)])
    expected = loss_curve(long_alone)
    assert len(expected) == 204
    np.testing.assert_allclose(loss_curve(tmp_path / "run"), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_asked_to_end_and_started_again_ranks_end_with_the_same_bits(atlas, tmp_path, world_size):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    asked = [Attempt(parts, config(), ask_after=steps) for steps in (1, 6, 15)]
    pretrain_together(
        world_size, tmp_path, atlas, [Attempt(whole, config()), *asked, Attempt(parts, config())]
    )
    assert [line["step"] for line in metrics(parts) if "began" in line] == [0, 2, 7, 16]
    assert files_of(parts / "model") == files_of(whole / "model")


def test_processes_that_torchrun_starts_have_the_loss_curve_of_one_process_and_speak_once(
    atlas, alone, tmp_path
):
    settings = [f"--config={alone.model.parent / 'config.toml'}", "--log-steps", "1"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "annatac_scale", "pretrain", str(atlas.path), "--out", str(tmp_path / "run"), *settings),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{tmp_path / 'run' / 'model'}: 360 cells")
    assert [x["world_size"] for x in metrics(tmp_path / "run") if "began" in x] == [2]
    found = [x["validation_score"] for x in metrics(tmp_path / "run") if "validation_score" in x]
    expected = [x["validation_score"] for x in metrics(alone.model.parent) if "validation_score" in x]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def lineage(run):
    """(epoch, step, ids) of each step that the final weights come from, by logs of cells and the last checkpoint."""
    last = max((run / "checkpoints").glob("step-*.pt"))
    saved = torch.load(last, weights_only=True)
    ends = [first for _, first in saved["lineage"][1:]] + [saved["state"]["step"]]
    for (attempt, first), end in zip(saved["lineage"], ends, strict=True):
        steps = {}
        for file in sorted((run / "cells").glob(f"attempt-{attempt:04d}-rank-*.jsonl")):
            for line in map(json.loads, file.read_text().splitlines()):
                steps.setdefault(line["step"], (line["epoch"], []))[1].extend(line["cells"])
        for step in range(first, end):
            yield (steps[step][0], step, steps[step][1])


def seen_by_epoch(run):
    seen = {}
    for epoch, _, cells in lineage(run):
        seen.setdefault(epoch, []).extend(cells)
    return seen


@pytest.mark.slow
def test_each_cell_comes_once_an_epoch_however_many_ranks_there_are_in_each_attempt(atlas, tmp_path, alone):
    run, options = tmp_path / "run", RunOptions(log_cells=True, checkpoint_steps=4, log_steps=1)
    for number, (world_size, steps) in enumerate([(2, 5), (3, 14), (1, 20), (4, 0)]):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        pretrain_together(world_size, scratch, atlas, [Attempt(run, config(), options, steps)])
    training = PretrainData.of(atlas, config(), Silent()).training
    seen = seen_by_epoch(run)
    assert sorted(seen) == list(range(EPOCHS))
    for cells in seen.values():
        np.testing.assert_array_equal(np.sort(cells), training)
    assert [line["world_size"] for line in metrics(run) if "began" in line] == [2, 3, 1, 4]
    assert report_of(pretrain_folder(atlas, run, config())).figures == pytest.approx(alone.figures, abs=1e-4)
