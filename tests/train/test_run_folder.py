import errno
import json
from dataclasses import replace

import pytest
import torch
from planted import Lines, StopAfter, files_of, small_finetuning, small_pretraining

from annatac_scale.config import read_toml
from annatac_scale.errors import ConfigError, InputError, StoreError
from annatac_scale.progress import Silent
from annatac_scale.store import leases
from annatac_scale.store.place import place_of
from annatac_scale.train import run_folder
from annatac_scale.train.checkpoint import checkpoint_name
from annatac_scale.train.presets import FinetuneConfig, PretrainConfig, finetune_preset, pretrain_preset
from annatac_scale.train.pretrain import pretrain
from annatac_scale.train.run_folder import RunFolder
from annatac_scale.train.run_options import RunOptions

IDENTITY = {"kind": "pretrain", "samples": {"s0": "abc"}}
SAY = Silent().say


def run_at(path, config=None, **identity):
    return RunFolder(path, config or small_pretraining(), {**IDENTITY, **identity})


def write_checkpoint(run):
    run.place.write(f"checkpoints/{checkpoint_name(1)}", b"")


def test_a_run_writes_its_configuration_and_takes_the_same_one_again(tmp_path):
    for _ in range(2):
        with run_at(tmp_path / "deep" / "run").use(SAY) as run:
            assert not run.complete
    recorded = json.loads((tmp_path / "deep" / "run" / "run.json").read_text())
    assert recorded["samples"] == {"s0": "abc"}
    assert recorded["config"]["encoder"]["width"] == 16


@pytest.mark.parametrize(
    ("kind", "config", "other"),
    [
        (PretrainConfig, small_pretraining(7, attend="all", seed=5), pretrain_preset("paper")),
        (FinetuneConfig, small_finetuning("cnn", class_weights="paper"), finetune_preset("small")),
    ],
    ids=["pretrain", "finetune"],
)
def test_the_written_config_gives_the_configuration_back_whatever_the_preset(tmp_path, kind, config, other):
    with run_at(tmp_path / "run", config).use(SAY):
        pass
    assert read_toml(kind, tmp_path / "run" / "config.toml", other) == config


@pytest.mark.parametrize(
    ("config", "identity", "message"),
    [
        (small_pretraining(3), {}, r"train.epochs 2 \(now 3\)"),
        (small_pretraining(attend="all"), {}, r"encoder.attend open \(now all\)"),
        (None, {"samples": {"s0": "other"}}, r"samples.s0 abc \(now other\)"),
        (None, {"samples": {"s0": "abc", "s1": "d"}}, r"samples.s1 None \(now d\)"),
        (small_pretraining(9, seed=1, clip=2.0, lanes=2, precision="bf16", patience=2), {}, "and 1 more"),
    ],
)
def test_another_configuration_or_input_is_refused_and_named(tmp_path, config, identity, message):
    with run_at(tmp_path / "run").use(SAY) as run:
        write_checkpoint(run)
    with pytest.raises(ConfigError, match=message), run_at(tmp_path / "run", config, **identity).use(SAY):
        pass


def test_a_run_that_has_no_checkpoint_yet_gives_way_to_other_settings(tmp_path):
    with run_at(tmp_path / "run").use(SAY):
        pass
    with run_at(tmp_path / "run", small_pretraining(3)).use(SAY) as run:
        assert read_toml(PretrainConfig, run.location / "config.toml").train.epochs == 3


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no run; choose another --out"), run_at(tmp_path).use(SAY):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    with (
        pytest.raises(InputError, match="found a file, expected a folder"),
        run_at(tmp_path / "thesis.txt").use(SAY),
    ):
        pass


@pytest.mark.parametrize("left", [".lock", "config.toml", ".run.json.123.partial"])
def test_a_run_killed_before_it_began_begins(tmp_path, left):
    (tmp_path / left).write_text("")
    with run_at(tmp_path).use(SAY):
        assert json.loads((tmp_path / "run.json").read_text())["kind"] == "pretrain"


def test_half_a_model_folder_of_a_killed_run_is_cleared_away(tmp_path):
    with run_at(tmp_path / "run").use(SAY):
        pass
    left_over = tmp_path / "run" / ".model.123.part"
    left_over.mkdir()
    (left_over / "weights.safetensors").write_text("half")
    with run_at(tmp_path / "run").use(SAY):
        assert not left_over.exists()


def test_a_run_in_use_is_refused_until_its_user_is_done(tmp_path):
    message = "another process is using this run; wait for it"
    first, second = run_at(tmp_path / "run"), run_at(tmp_path / "run")
    # A lock belongs to an opened file: a second opening is refused in this process as in another.
    with first.use(SAY), pytest.raises(InputError, match=message), second.use(SAY):
        pass
    with run_at(tmp_path / "run").use(SAY):
        pass


def test_a_run_json_that_was_edited_is_an_error(tmp_path):
    with run_at(tmp_path / "run").use(SAY) as run:
        write_checkpoint(run)
    (tmp_path / "run" / "run.json").write_text("{")
    with (
        pytest.raises(InputError, match=r"run\.json: cannot be read as JSON"),
        run_at(tmp_path / "run").use(SAY),
    ):
        pass


def test_a_run_in_object_storage_is_the_run_on_disk(atlas, s3, tmp_path):
    url = f"{s3.bucket()}/runs/a"
    with pytest.raises(KeyboardInterrupt):
        pretrain(atlas, f"{url}/", small_pretraining(3), StopAfter(2))
    assert not place_of(url).size("model/config.json")
    progress = Lines()
    report = pretrain(atlas, url, small_pretraining(3), progress)
    assert any(line.startswith(f"resuming {url} after 24 steps") for line in progress.lines)
    local = pretrain(atlas, tmp_path / "run", small_pretraining(3))
    assert replace(report, model=local.model) == local
    names = place_of(local.model).names()
    assert s3.keys(f"{url}/model") == names
    for name in names:
        assert s3.get(f"{url}/model/{name}") == (local.model / name).read_bytes(), name
    lines = [json.loads(line) for line in s3.get(f"{url}/metrics.jsonl").splitlines()]
    assert [(x["attempt"], x["step"]) for x in lines if "began" in x] == [(1, 0), (2, 24)]
    assert [x["epoch"] for x in lines if "validation_score" in x] == [1, 2, 3]
    assert any(name.startswith("tensorboard/") for name in s3.keys(url))
    assert not [name for name in s3.keys(url) if "lock" in name]


def test_a_run_in_object_storage_that_is_in_use_is_refused(s3, monkeypatch):
    monkeypatch.setattr(leases, "REFRESH_S", 0.05)
    monkeypatch.setattr(run_folder, "_LOOK_S", 0.2)
    url, said = f"{s3.bucket()}/run", []
    with (
        run_at(url).use(SAY),
        pytest.raises(InputError, match="another process is using this run"),
        run_at(url).use(said.append),
    ):
        pass
    assert said == [f"{url}: in use, or its user died; waiting to see which, a minute or some"]
    with run_at(url).use(SAY):
        pass


def test_a_disk_without_locks_is_refused_with_what_to_do(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    message = r"run: cannot be locked \(Function not implemented\).*mount it with locks"
    with pytest.raises(InputError, match=message), run_at(tmp_path / "run").use(SAY):
        pass


def test_a_log_of_cells_that_cannot_be_written_is_an_error_that_names_it(atlas, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "cells").write_text("in the way")
    with pytest.raises(StoreError, match=r"run/cells/attempt-0001-rank-0000\.jsonl: cannot be written"):
        pretrain(atlas, tmp_path / "run", small_pretraining(1), options=RunOptions(log_cells=True))


def test_logs_of_cells_are_for_disks(atlas, s3):
    with pytest.raises(ConfigError, match=r"--log-cells: found --out s3://.*, expected a folder on a disk"):
        pretrain(atlas, f"{s3.bucket()}/run", small_pretraining(1), options=RunOptions(log_cells=True))


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_minutes": 0.0},
        {"checkpoint_steps": -1},
        {"keep": 0},
        {"log_steps": 0},
        {"on_nan": "ignore"},
    ],
)
def test_options_of_a_run_out_of_range_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} .*: expected"):
        RunOptions(**options)


def test_options_of_a_run_may_change_from_one_attempt_to_the_next(atlas, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pretrain(atlas, tmp_path / "run", small_pretraining(2), StopAfter(1), RunOptions(keep=1))
    options = RunOptions(keep=9, checkpoint_steps=5, on_nan="skip", deterministic=True)
    report = pretrain(atlas, tmp_path / "run", small_pretraining(2), options=options)
    undisturbed = pretrain(atlas, tmp_path / "undisturbed", small_pretraining(2))
    assert files_of(report.model) == files_of(undisturbed.model)
    assert not torch.are_deterministic_algorithms_enabled()
