import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import Lines, files_of, small_pretraining
from torch import multiprocessing

from annatac_scale.errors import ConfigError
from annatac_scale.model.folder import read_model
from annatac_scale.progress import Silent
from annatac_scale.store.store import IslandStore
from annatac_scale.train.checkpoint import RunFolder
from annatac_scale.train.loop import Ranks, accumulate
from annatac_scale.train.pretrain import (
    PretrainData,
    pretrain,
    pretrain_folder,
    pretrain_rank,
    pretrain_task,
    report_of,
)

CPU = torch.device("cpu")
EPOCHS = 3


def config():
    return small_pretraining(EPOCHS, global_batch_size=32)


def gradients_of_first_batches(store, ranks):
    """Gradients in float64 of a full batch, then of the last batch of an epoch, of which a rank may have no cell."""
    data = PretrainData.of(store, config(), Silent())
    torch.manual_seed(ranks.rank)
    task = pretrain_task(data, config(), ranks)
    task.module.double()
    with torch.no_grad():
        task.module.encoder.linformer.positions.normal_()
    ranks.share(task.module)
    # 360 cells in batches of 359: the second batch has one cell.
    options = replace(config().train, global_batch_size=359)
    found = []
    for batch in data.stream(data.training, options, ranks):
        task.module.zero_grad()
        losses = accumulate(task, task.prepare(batch, 0), options, ranks)
        grads = {name: p.grad.clone() for name, p in task.module.named_parameters()}
        found.append({"cells": len(batch), "grads": grads, "losses": {n: vars(x) for n, x in losses.items()}})
    return found, task.module.state_dict()


def on_gloo(rank, world_size, folder, store_path):
    """One of some processes: gradients, then two whole runs."""
    torch.set_num_threads(1)
    folder = Path(folder)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world_size
    )
    ranks = Ranks(rank, world_size, CPU)
    assert ranks.agree(3.0)
    assert not ranks.agree(float(rank))
    assert ranks.sum([1.0, float(rank)]) == [2.0, 1.0]
    store = IslandStore.open(store_path)
    found, _ = gradients_of_first_batches(store, ranks)
    torch.save(found, folder / f"rank{rank}.pt")
    for name in ("once", "again"):
        run = pretrain_folder(store, folder / name, config(), world_size)
        if rank == 0:
            with run.use():
                ranks.wait()
                pretrain_rank(store, run, config(), ranks, Silent())
        else:
            ranks.wait()
            pretrain_rank(store, run, config(), ranks, Silent())
        ranks.wait()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(atlas, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(on_gloo, (2, str(folder), str(atlas.path)), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def alone(atlas, tmp_path_factory):
    """An undisturbed run in one process."""
    return pretrain(atlas, tmp_path_factory.mktemp("alone") / "run", config())


def loss_curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("validation_level_loss", "validation_open_loss", "validation_open_accuracy", "level_loss")
    return [[line.get(name, 0.0) for name in names] for line in lines]


def test_gradients_on_two_ranks_are_those_of_one_process(atlas, two_ranks):
    first, second = (torch.load(two_ranks / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    expected, _ = gradients_of_first_batches(atlas, Ranks(device=CPU))
    assert [(a["cells"], b["cells"]) for a, b in zip(first, second, strict=True)] == [(179, 180), (0, 1)]
    for rank in (first, second):
        for found, one in zip(rank, expected, strict=True):
            for name, gradient in one["grads"].items():
                torch.testing.assert_close(found["grads"][name], gradient, atol=1e-6, rtol=1e-6, msg=name)
            for name, loss in one["losses"].items():
                assert found["losses"][name] == pytest.approx(loss, rel=1e-9)


def test_training_on_two_ranks_has_the_loss_curve_of_one_process_and_repeats_its_bits(alone, two_ranks):
    np.testing.assert_allclose(loss_curve(two_ranks / "once"), loss_curve(alone.model.parent), atol=1e-4)
    assert files_of(two_ranks / "once" / "model") == files_of(two_ranks / "again" / "model")


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_training_on_ray_has_the_loss_curve_of_one_process_and_leaves_nothing_but_the_run(
    atlas, alone, tmp_path, monkeypatch, capfd
):
    from annatac_scale.train.cluster import pretrain_on_ray

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    progress = Lines()
    report = pretrain_on_ray(atlas.path, Path("run"), config(), 2, progress=progress)
    np.testing.assert_allclose(loss_curve(tmp_path / "run"), loss_curve(alone.model.parent), atol=1e-4)
    assert report.n_cells == 360
    assert report.figures["score"] == pytest.approx(alone.figures["score"], abs=1e-4)
    assert read_model(report.model).info.provenance["validation"] == report.figures
    assert [line.split(":")[0] for line in progress.lines if line.startswith("epoch")] == [
        f"epoch {n}" for n in range(1, EPOCHS + 1)
    ]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {".lock", "run.json", "config.toml", "metrics.jsonl", "checkpoints", "model"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("workers", [0, 33])
def test_workers_out_of_range_are_refused_before_ray_starts(atlas, tmp_path, workers):
    from annatac_scale.train.cluster import pretrain_on_ray

    with pytest.raises(ConfigError, match=f"--workers {workers}: expected 1 to the global batch size, 32"):
        pretrain_on_ray(atlas.path, tmp_path / "run", config(), workers)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_more_gpus_than_there_are_are_refused_before_ray_starts(atlas, tmp_path, monkeypatch):
    from annatac_scale.train.cluster import pretrain_on_ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="this machine has 0 GPUs"):
        pretrain_on_ray(atlas.path, tmp_path / "run", config(), 1, gpus=True)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_world_size_is_refused_before_ray_starts(atlas, alone, tmp_path):
    from annatac_scale.train.cluster import pretrain_on_ray

    with pytest.raises(ConfigError, match=r"world_size 1 \(now 2\)"):
        pretrain_on_ray(atlas.path, alone.model.parent, config(), 2)


def test_report_of_reads_back_what_a_run_made(atlas, alone):
    run = RunFolder(alone.model.parent, config(), {})
    assert report_of(run) == alone
