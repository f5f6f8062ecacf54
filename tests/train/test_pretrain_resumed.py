import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import Lines, StopAfter, StopInStep, files_of, small_pretraining
from safetensors.torch import load_file

import annatac_scale.train.pretrain as pretrain_module
from annatac_scale.errors import RunInterruptedError
from annatac_scale.store.place import place_of
from annatac_scale.store.store import IslandStore
from annatac_scale.train.checkpoint import Checkpoints, checkpoint_steps
from annatac_scale.train.pretrain import PretrainTask, pretrain
from annatac_scale.train.run_options import RunOptions


@pytest.fixture(scope="module")
def undisturbed(atlas, tmp_path_factory):
    """The files of a run of 4 epochs that nothing interrupted."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    report = pretrain(atlas, run, small_pretraining(4))
    return files_of(run / "model"), report


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(atlas, tmp_path, undisturbed):
    files, _ = undisturbed
    pretrain(atlas, tmp_path / "again", small_pretraining(4))
    assert files_of(tmp_path / "again" / "model") == files
    pretrain(atlas, tmp_path / "other", small_pretraining(4, seed=1))
    assert files_of(tmp_path / "other" / "model")["weights.safetensors"] != files["weights.safetensors"]


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_interrupted_after_an_epoch_the_same_command_gives_the_same_bits(atlas, tmp_path, undisturbed, epoch):
    files, report = undisturbed
    with pytest.raises(KeyboardInterrupt):
        pretrain(atlas, tmp_path / "run", small_pretraining(4), StopAfter(epoch))
    progress = Lines()
    assert (
        replace(pretrain(atlas, tmp_path / "run", small_pretraining(4), progress), model=report.model)
        == report
    )
    where = f"after {12 * epoch} steps: epoch {epoch}, step 0 of 12"
    assert f"resuming {tmp_path / 'run'} {where}" in progress.lines
    assert files_of(tmp_path / "run" / "model") == files


@pytest.mark.parametrize("steps", [5, 30])
@pytest.mark.parametrize("every", [0, 7])
def test_interrupted_within_an_epoch_the_same_command_gives_the_same_bits(
    atlas, tmp_path, undisturbed, steps, every
):
    options = RunOptions(checkpoint_steps=every)
    with pytest.raises(KeyboardInterrupt):
        pretrain(atlas, tmp_path / "run", small_pretraining(4), StopInStep(steps, interrupt), options)
    progress = Lines()
    pretrain(atlas, tmp_path / "run", small_pretraining(4), progress, options)
    kept = max(n for n in range(steps) if n % 12 == 0 or (every and n % every == 0))
    assert any(f"after {kept} steps: epoch {kept // 12}, step {kept % 12} of 12" in x for x in progress.lines)
    assert files_of(tmp_path / "run" / "model") == undisturbed[0]


def test_state_is_kept_by_the_clock(atlas, tmp_path):
    pretrain(
        atlas, tmp_path / "run", small_pretraining(1), options=RunOptions(checkpoint_minutes=1e-9, keep=99)
    )
    steps = checkpoint_steps(place_of(tmp_path / "run" / "checkpoints"))
    assert steps[0] == 0
    assert steps[-1] == 12
    assert len(steps) > 2


@pytest.mark.parametrize("moment", ["before", "within"])
@pytest.mark.parametrize("number", [2, 3])
def test_interrupted_while_saving_the_same_command_gives_the_same_bits(
    atlas, tmp_path, undisturbed, monkeypatch, number, moment
):
    save, saved = Checkpoints.save, []

    def save_and_stop(self, step, *arguments, **options):
        saved.append(step)
        if len(saved) == number:
            if moment == "within":
                half = tmp_path / "run" / "checkpoints" / f".step-{step:09d}.pt.123.partial"
                half.write_bytes(b"half a checkpoint")
            raise KeyboardInterrupt
        save(self, step, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(atlas, tmp_path / "run", small_pretraining(4))
    monkeypatch.undo()
    pretrain(atlas, tmp_path / "run", small_pretraining(4))
    assert files_of(tmp_path / "run" / "model") == undisturbed[0]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before_and_nothing_else(
    atlas, tmp_path, undisturbed
):
    with pytest.raises(KeyboardInterrupt):
        pretrain(atlas, tmp_path / "run", small_pretraining(4), StopAfter(3))
    newest = tmp_path / "run" / "checkpoints" / "step-000000036.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    progress = Lines()
    pretrain(atlas, tmp_path / "run", small_pretraining(4), progress)
    assert any("step-000000036.pt: damaged" in line for line in progress.lines)
    assert any("after 24 steps" in line for line in progress.lines)
    assert files_of(tmp_path / "run" / "model") == undisturbed[0]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import torch
from planted import StopInStep, small_pretraining
from annatac_scale.store.store import IslandStore
from annatac_scale.train.pretrain import pretrain
torch.set_num_threads(1)
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
pretrain(IslandStore.open(sys.argv[1]), sys.argv[2], small_pretraining(4), StopInStep(29, kill))
"""


def test_killed_the_same_command_gives_the_same_bits(atlas, tmp_path, undisturbed):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED, str(atlas.path), str(tmp_path / "run"), here]
    found = subprocess.run(command, capture_output=True, timeout=200, check=False)
    assert found.returncode == -signal.SIGKILL, found.stderr.decode()
    progress = Lines()
    pretrain(atlas, tmp_path / "run", small_pretraining(4), progress)
    assert any("after 24 steps" in line for line in progress.lines)
    assert files_of(tmp_path / "run" / "model") == undisturbed[0]


def get_sigterm_in(monkeypatch, owner, name):
    """Have this process sent SIGTERM each time that a function is called."""
    function = getattr(owner, name)

    def asked(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, asked)


def test_asked_to_end_while_it_validates_a_run_keeps_the_last_step_and_validates_when_it_goes_on(
    atlas, tmp_path, undisturbed, monkeypatch
):
    get_sigterm_in(monkeypatch, PretrainTask, "validate")
    for _ in range(2):
        with pytest.raises(RunInterruptedError, match="ended after 12 steps, which are kept") as raised:
            pretrain(atlas, tmp_path / "run", small_pretraining(4))
        assert raised.value.number == signal.SIGTERM
    monkeypatch.undo()
    pretrain(atlas, tmp_path / "run", small_pretraining(4))
    assert files_of(tmp_path / "run" / "model") == undisturbed[0]


@pytest.mark.parametrize("name", ["count_levels", "truncated_svd", "write_model"])
def test_asked_to_end_where_no_steps_are_taken_a_run_ends_at_once(
    atlas, tmp_path, undisturbed, monkeypatch, name
):
    get_sigterm_in(monkeypatch, pretrain_module, name)
    with pytest.raises(RunInterruptedError, match="the same command goes on") as raised:
        pretrain(atlas, tmp_path / "run", small_pretraining(4))
    assert raised.value.number == signal.SIGTERM
    monkeypatch.undo()
    pretrain(atlas, tmp_path / "run", small_pretraining(4))
    assert files_of(tmp_path / "run" / "model") == undisturbed[0]


def test_metrics_say_where_a_run_went_on(atlas, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pretrain(atlas, tmp_path / "run", small_pretraining(2), StopAfter(1))
    pretrain(atlas, tmp_path / "run", small_pretraining(2))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(x["attempt"], x["step"]) for x in lines if "began" in x] == [(1, 0), (2, 12)]
    assert [(x["attempt"], x["epoch"]) for x in lines if "validation_score" in x] == [(1, 1), (2, 2)]


def test_the_random_state_of_the_caller_does_not_matter(atlas, tmp_path, undisturbed):
    torch.manual_seed(123)
    np.random.seed(5)  # noqa: NPY002
    pretrain(IslandStore.open(atlas.path), tmp_path / "run", small_pretraining(4))
    weights = load_file(tmp_path / "run" / "model" / "weights.safetensors")
    assert weights["linformer.projection"].shape == (60, 8)
    assert files_of(tmp_path / "run" / "model") == undisturbed[0]
