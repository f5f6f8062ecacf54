import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import Lines, small_pretraining

from annatac_scale.errors import ConfigError, InputError, RunInterruptedError
from annatac_scale.model.folder import read_model
from annatac_scale.progress import Silent
from annatac_scale.train import cluster
from annatac_scale.train.board import MOST_FUTILE, Board
from annatac_scale.train.cluster import Cluster, _watched, pretrain_on_ray
from annatac_scale.train.interruption import Interruption
from annatac_scale.train.pretrain import pretrain

EPOCHS = 3


def config():
    return small_pretraining(EPOCHS, global_batch_size=32)


@pytest.fixture(scope="module")
def alone(atlas, tmp_path_factory):
    """An undisturbed run in one process."""
    return pretrain(atlas, tmp_path_factory.mktemp("alone") / "run", config())


def loss_curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("validation_level_loss", "validation_open_loss", "validation_open_accuracy", "level_loss")
    return [[line.get(name, 0.0) for name in names] for line in lines if "began" not in line]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_training_on_ray_has_the_loss_curve_of_one_process_and_leaves_nothing_but_the_run(
    atlas, alone, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    progress = Lines()
    report = pretrain_on_ray(atlas.path, Path("run"), config(), Cluster(2, 2), progress)
    np.testing.assert_allclose(loss_curve(tmp_path / "run"), loss_curve(alone.model.parent), atol=1e-4)
    assert report.n_cells == 360
    assert report.figures["score"] == pytest.approx(alone.figures["score"], abs=1e-4)
    assert read_model(report.model).info.provenance["validation"] == report.figures
    assert [line.split(":")[0] for line in progress.lines if line.startswith("epoch")] == [
        f"epoch {n}" for n in range(1, EPOCHS + 1)
    ]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {
        ".lock",
        "run.json",
        "config.toml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "model",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("workers", ["0:2", "4:2", "two", "2:", ":2", "1:2:3", "-1"])
def test_workers_are_a_number_or_two(workers):
    with pytest.raises(ConfigError, match=f"--workers {workers}: expected N or MIN:MAX"):
        Cluster.of(workers)


def test_workers_may_be_given_as_a_number_or_two():
    assert Cluster.of("4") == Cluster.of(4) == Cluster(4, 4)
    assert Cluster.of("4:16", gpus=True, address="auto") == Cluster(4, 16, True, "auto")


def test_addresses_of_rays_client_are_refused():
    with pytest.raises(ConfigError, match="ray job submit"):
        Cluster.of(2, address="ray://head:10001")


def test_more_workers_than_cells_in_a_batch_are_refused_before_ray_starts(atlas, tmp_path):
    with pytest.raises(
        ConfigError, match="--workers 33: expected 1 to 32, the lanes of a global batch of 32"
    ):
        pretrain_on_ray(atlas.path, tmp_path / "run", config(), Cluster(2, 33))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_more_gpus_than_there_are_are_refused_before_ray_starts(atlas, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="this machine has 0 GPUs"):
        pretrain_on_ray(atlas.path, tmp_path / "run", config(), Cluster(1, 1, gpus=True))
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_is_not_there_is_an_error_that_says_what_to_do(atlas, tmp_path):
    with pytest.raises(InputError, match=r"--ray 127\.0\.0\.1:1: found no Ray cluster there; start one"):
        pretrain_on_ray(atlas.path, tmp_path / "run", config(), Cluster(1, 1, address="127.0.0.1:1"))


def asked_to_end(board):
    """Ask a driver to end whose workers never do."""
    over, asked = threading.Event(), Interruption()
    asked.ask(signal.SIGTERM)
    try:
        _watched(over.wait, board, Cluster(2, 2), Silent(), asked)
    finally:
        over.set()


@pytest.mark.parametrize("attempts", [0, 1])
def test_a_driver_asked_to_end_waits_for_no_workers_that_take_no_steps(attempts):
    board = Board()
    for _ in range(attempts):
        board.begin(0)
    with pytest.raises(RunInterruptedError, match="asked to end while no steps were taken") as raised:
        asked_to_end(board)
    assert raised.value.number == signal.SIGTERM


def test_a_driver_asked_to_end_waits_only_so_long_for_workers_that_hang(monkeypatch):
    monkeypatch.setattr(cluster, "LEAVE_S", 1.5)
    board, begin = Board(), time.monotonic()
    board.begin(0)
    board.heed()
    with pytest.raises(RunInterruptedError, match="asked to end, and the workers did not in 2 s"):
        asked_to_end(board)
    assert board.signal == signal.SIGTERM
    assert time.monotonic() - begin > 1.5


def test_workers_that_begin_again_take_no_steps_yet():
    board = Board()
    board.begin(0)
    assert not board.ask(signal.SIGTERM)
    board.heed()
    assert board.ask(signal.SIGTERM)
    board.begin(20)
    assert not board.ask(signal.SIGTERM)


@pytest.mark.parametrize("n_before", [0, 2])
def test_attempts_that_get_no_further_are_ended(n_before):
    board = Board()
    for step in range(n_before):
        board.begin(step)
    for _ in range(MOST_FUTILE):
        board.begin(20)
        assert board.error is None
    board.met("RuntimeError: out of memory")
    board.begin(20)
    kind, message = board.error
    assert kind == "AnnatacError"
    assert f"ended {MOST_FUTILE} times after step 20" in message
    assert "out of memory" in message
