import json

import pytest
import torch
from planted import small_finetuning, small_pretraining

from annatac_scale.config import read_toml
from annatac_scale.errors import ConfigError, InputError, ModelError
from annatac_scale.train.checkpoint import RunFolder
from annatac_scale.train.presets import FinetuneConfig, PretrainConfig, finetune_preset, pretrain_preset

IDENTITY = {"kind": "pretrain", "samples": {"s0": "abc"}, "world_size": 1}


def run_at(path, config=None, **identity):
    return RunFolder(path, config or small_pretraining(), {**IDENTITY, **identity})


def state():
    return {"module": {"w": torch.arange(5000.0)}, "state": {"step": 3, "best_score": float("-inf")}}


def test_a_run_writes_its_configuration_and_takes_the_same_one_again(tmp_path):
    for _ in range(2):
        with run_at(tmp_path / "deep" / "run").use() as run:
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
    with run_at(tmp_path / "run", config).use():
        pass
    assert read_toml(kind, tmp_path / "run" / "config.toml", other) == config


@pytest.mark.parametrize(
    ("config", "identity", "message"),
    [
        (small_pretraining(3), {}, r"train.epochs 2 \(now 3\)"),
        (small_pretraining(attend="all"), {}, r"encoder.attend open \(now all\)"),
        (None, {"samples": {"s0": "other"}}, r"samples.s0 abc \(now other\)"),
        (None, {"samples": {"s0": "abc", "s1": "d"}}, r"samples.s1 None \(now d\)"),
        (None, {"world_size": 2}, r"world_size 1 \(now 2\)"),
        (small_pretraining(9, seed=1, clip=2.0, lanes=2, precision="bf16", patience=2), {}, "and 1 more"),
    ],
)
def test_another_configuration_or_input_is_refused_and_named(tmp_path, config, identity, message):
    with run_at(tmp_path / "run").use() as run:
        run.save("last", {})
    with pytest.raises(ConfigError, match=message), run_at(tmp_path / "run", config, **identity).use():
        pass


def test_a_run_that_has_no_checkpoint_yet_gives_way_to_other_settings(tmp_path):
    with run_at(tmp_path / "run").use():
        pass
    with run_at(tmp_path / "run", small_pretraining(3)).use() as run:
        assert read_toml(PretrainConfig, run.path / "config.toml").train.epochs == 3


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no run; choose another --out"), run_at(tmp_path).use():
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="holds no run"), run_at(tmp_path / "thesis.txt").use():
        pass


def test_a_run_killed_before_it_began_begins(tmp_path):
    for name in (".lock", "config.toml", ".run.json.part"):
        (tmp_path / name).write_text("")
        with run_at(tmp_path).use():
            assert json.loads((tmp_path / "run.json").read_text())["world_size"] == 1
        (tmp_path / "run.json").unlink()
        for file in (".lock", "config.toml"):
            (tmp_path / file).unlink(missing_ok=True)
        (tmp_path / "checkpoints").rmdir()


def test_half_a_model_folder_of_a_killed_run_is_cleared_away(tmp_path):
    with run_at(tmp_path / "run").use():
        pass
    left_over = tmp_path / "run" / ".model.123.part"
    left_over.mkdir()
    (left_over / "weights.safetensors").write_text("half")
    with run_at(tmp_path / "run").use():
        assert not left_over.exists()


def test_a_run_in_use_is_refused_until_its_user_is_done(tmp_path):
    message = "another process is using this run; wait for it"
    first, second = run_at(tmp_path / "run"), run_at(tmp_path / "run")
    # A lock belongs to an opened file: a second opening is refused in this process as in another.
    with first.use(), pytest.raises(InputError, match=message), second.use():
        pass
    with run_at(tmp_path / "run").use():
        pass


def test_a_checkpoint_comes_back_as_it_was_and_replaces_the_one_before(tmp_path):
    with run_at(tmp_path / "run").use() as run:
        assert not run.has("last")
        run.save("last", {"module": {}})
        run.save("last", state())
        assert run.has("last")
        found = run.load("last")
    assert found["state"] == state()["state"]
    assert torch.equal(found["module"]["w"], state()["module"]["w"])
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.pt"]


def test_a_failure_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path):
    class Unwritable:
        def __reduce__(self):
            raise KeyboardInterrupt

    with run_at(tmp_path / "run").use() as run:
        run.save("last", state())
        with pytest.raises(KeyboardInterrupt):
            run.save("last", {"module": {}, "more": Unwritable()})
        assert run.load("last")["state"]["step"] == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:2000],
        lambda data: b"",
        lambda data: b"no checkpoint" * 50,
        lambda data: bytes(len(data)),
        lambda data: data[:9000] + bytes([data[9000] ^ 1]) + data[9001:],
    ],
    ids=["cut_short", "empty", "text", "zeros", "one_bit"],
)
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_delete(tmp_path, damage):
    with run_at(tmp_path / "run").use() as run:
        run.save("last", state())
        file = tmp_path / "run" / "checkpoints" / "last.pt"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(
            ModelError, match=r"last.pt: damaged checkpoint .*; delete .*checkpoints to train"
        ):
            run.load("last")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    with run_at(tmp_path / "run").use() as run:
        torch.save({"module": Harm()}, tmp_path / "run" / "checkpoints" / "last.pt")
        with pytest.raises(ModelError, match="damaged checkpoint"):
            run.load("last")


def test_a_run_json_that_was_edited_is_an_error(tmp_path):
    with run_at(tmp_path / "run").use() as run:
        run.save("last", {})
    (tmp_path / "run" / "run.json").write_text("{")
    with (
        pytest.raises(InputError, match=r"run\.json: cannot be read as JSON"),
        run_at(tmp_path / "run").use(),
    ):
        pass


def test_log_appends_lines_of_json(tmp_path):
    with run_at(tmp_path / "run").use() as run:
        run.log({"step": 1})
        run.log({"step": 2, "loss": 0.5})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2, "loss": 0.5}]
