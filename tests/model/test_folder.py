"""A model folder gives back the model that was written, or says which file is not what it was."""

import gzip
import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from model_folders import (
    DAMAGES,
    HEADS,
    MODEL_FILES,
    TYPER_FILES,
    files_of,
    resigned,
    toy_batch,
    toy_model,
    toy_space,
)

from annatac_scale.errors import ModelError
from annatac_scale.model.cell_typer import HeadConfig, batch_tokens
from annatac_scale.model.folder import read_model, write_model
from annatac_scale.model.known_cells import KNOWN_FILE, encoded
from annatac_scale.model.novelty import SCORES, TRENDED, DepthTrend, KnownCells
from annatac_scale.model.profiles import Profiles
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import create_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", toy_model(HEADS[1]), "# A model\n")
    return tmp_path / "model"


def assert_known_equal(found: KnownCells, expected: KnownCells) -> None:
    for name in ("means", "whitening", "references", "reference_codes", "chances", "codes", "n_open"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.trends == expected.trends
    assert found.scores.keys() == expected.scores.keys()
    for name, scores in expected.scores.items():
        np.testing.assert_array_equal(found.scores[name], scores)


@pytest.mark.parametrize("positions", ["frozen", "learned"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind if head else "pretrained")
def test_a_model_comes_back_as_it_was_written(
    tmp_path: Path, head: HeadConfig | None, norm: str, positions: str
) -> None:
    model = toy_model(head, norm=norm, positions=positions, attend="all", tokens_per_cell=4.5)
    write_model(tmp_path / "model", model, "# A model\n")
    back = read_model(tmp_path / "model")
    assert back.info == model.info
    assert back.vocabulary.sha256 == model.vocabulary.sha256
    np.testing.assert_array_equal(back.vocabulary.islands, model.vocabulary.islands)
    pd.testing.assert_frame_equal(back.islands, model.islands)
    batch = toy_batch()
    with torch.no_grad():
        tokens = batch_tokens(batch, torch.device("cpu"))
        assert torch.equal(back.encoder.linformer(*tokens), model.encoder.linformer(*tokens))
    assert (back.typer is None) == (head is None)
    if back.typer is not None:
        assert back.typer.linformer is back.encoder.linformer
        np.testing.assert_array_equal(back.typer.predict(batch), model.typer.predict(batch))
        assert_known_equal(back.known, model.known)
    assert back.path == tmp_path / "model"
    assert back.digest == hashlib.sha256((tmp_path / "model/config.json").read_bytes()).hexdigest()


def test_a_model_that_was_read_is_written_as_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "again", read_model(folder), "# A model\n")
    assert files_of(tmp_path / "again") == files_of(folder)


def test_a_model_that_was_read_drops_nothing(folder: Path) -> None:
    assert not read_model(folder).typer.training


def test_reading_another_model_into_a_copy_leaves_the_digest_to_tell_them_apart(tmp_path: Path) -> None:
    model = toy_model(HEADS[1])
    write_model(tmp_path / "a", model, "card")
    write_model(tmp_path / "b", replace(model, info=replace(model.info, temperature=2.0)), "card")
    with torch.no_grad():
        model.typer.head.classifier.bias[0] += 1
    write_model(tmp_path / "c", model, "card")
    assert len({read_model(tmp_path / name).digest for name in "abc"}) == 3


@pytest.mark.parametrize(
    ("head", "files"), [(None, MODEL_FILES), (HEADS[1], TYPER_FILES)], ids=["pre", "typer"]
)
def test_the_folder_holds_the_documented_files_and_no_pickle(
    tmp_path: Path, head: HeadConfig | None, files: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", toy_model(head), "# A model\n")
    found = files_of(tmp_path / "model")
    assert set(found) == files
    for name in files:
        if name.endswith(".json"):
            json.loads(found[name])
        elif name.endswith(".safetensors"):
            size = struct.unpack("<Q", found[name][:8])[0]
            tensors = json.loads(found[name][8 : 8 + size])
            kinds = {key: entry["dtype"] for key, entry in tensors.items() if key != "__metadata__"}
            integers = ("references.code", "calib.code", "calib.n_open")
            assert {kinds.pop(name, "I32") for name in integers} == {"I32"}
            assert set(kinds.values()) == {"F32"}
        elif name.endswith(".gz"):
            assert gzip.decompress(found[name]).startswith(b"island\tchrom\tstart\tend\tgenes\n")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for loader in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, loader, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    read_model(tmp_path / "model")


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", sorted(TYPER_FILES - {"README.md"}))
def test_a_damaged_file_is_refused_by_its_name(
    folder: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        read_model(folder)


@pytest.mark.parametrize("name", sorted(TYPER_FILES - {"README.md"}))
def test_a_missing_file_is_refused_by_its_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        read_model(folder)
    (folder / name).mkdir()
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        read_model(folder)


def test_every_value_of_config_json_is_covered_by_its_digest(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edits = {
        "encoder": {**config["encoder"], "heads": 1, "head_dim": 8},  # the same shapes, other results
        "counting": "fragment",
        "provenance": {},
        "head": None,
        "n_space": 31,
    }
    for key, value in edits.items():
        assert config[key] != value
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ModelError, match=r"config\.json: cut short or edited"):
            read_model(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "sub/weights.safetensors", "a\\b", ""])
def test_names_in_config_json_that_could_lead_elsewhere_are_never_opened(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("secret")
    config = json.loads((folder / "config.json").read_text())
    for files in ({**config["files"], name: "0" * 64}, {name: "0" * 64}):
        resign(folder, {**config, "files": files})
        with pytest.raises(ModelError, match=r"config\.json: cut short or edited"):
            read_model(folder)


def resign(folder: Path, config: dict) -> None:
    (folder / "config.json").write_bytes(resigned(config))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("encoder", {"width": 8}, "not a whole model folder"),
        ("encoder", {"width": -1}, "not a whole model folder"),
        ("head", {"kind": "lambda"}, "not a whole model folder"),
        ("files", None, r"config\.json: cut short or edited"),
        ("files", {}, r"config\.json: cut short or edited"),
        ("n_space", 3, r"islands\.tsv\.gz: not the vocabulary"),
        ("vocabulary_sha256", "0", r"islands\.tsv\.gz: not the vocabulary"),
        ("version", 2, "format annatac_scale.model 2, expected annatac_scale.model 5; train"),
        ("version", 4, "format annatac_scale.model 4, expected annatac_scale.model 5; train"),
        ("format", "other", "format other 5, expected"),
    ],
)
def test_folders_that_contradict_themselves_are_refused(
    folder: Path, key: str, value: object, message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    resign(folder, {**config, key: value})
    with pytest.raises(ModelError, match=message):
        read_model(folder)


def test_weights_of_other_sizes_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    resign(folder, {**config, "encoder": {**config["encoder"], "ff": 17}})
    with pytest.raises(ModelError, match=r"weights do not fit config\.json: size mismatch"):
        read_model(folder)


def test_a_model_of_version_4_that_knows_no_types_is_read(tmp_path: Path) -> None:
    write_model(tmp_path / "model", toy_model(None), "card")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    resign(tmp_path / "model", {**config, "version": 4})
    assert read_model(tmp_path / "model").typer is None
    resign(tmp_path / "model", {**config, "version": 3})
    with pytest.raises(ModelError, match=r"format annatac_scale\.model 3, expected"):
        read_model(tmp_path / "model")


def test_a_model_without_known_cells_comes_back_without(tmp_path: Path) -> None:
    write_model(tmp_path / "model", replace(toy_model(HEADS[1]), known=None), "card")
    assert not (tmp_path / "model" / KNOWN_FILE).exists()
    assert read_model(tmp_path / "model").known is None


@pytest.mark.parametrize(
    "changes",
    [
        {"means": np.ones((2, 5), np.float32)},
        {"whitening": np.ones((5, 4), np.float32)},
        {"references": np.ones((0, 5), np.float32)},
        {"references": np.ones((3, 4), np.float32)},
        {"reference_codes": np.full(7, 3, np.int32)},
        {"reference_codes": np.full(7, -1, np.int32)},
        {"reference_codes": np.zeros(6, np.int32)},
        {"codes": np.full(12, 3, np.int32)},
        {"codes": np.full(12, -1, np.int32)},
        {"codes": np.zeros(12, np.int64)},
        {"chances": np.ones(11, np.float32)},
        {"n_open": np.ones(11, np.int32)},
        {"n_open": np.ones(12, np.int64)},
        {"scores": {name: np.ones(11, np.float32) for name in SCORES}},
        {"scores": {name: np.full(12, np.nan, np.float32) for name in SCORES}},
        {"trends": {name: DepthTrend(0, 0, 1, 0, 0, 0) for name in TRENDED}, "scores": {}},
        {"profiles": Profiles(np.ones((2, 3), np.float32))},
        {"profiles": Profiles(np.full((20, 3), np.nan, np.float32))},
        {"profiles": Profiles(np.full((20, 3), 3e38, np.float32))},
        {"means": np.full((3, 5), np.inf, np.float32)},
        {"n_open": np.full(12, -1, np.int32)},
        {"trends": {name: DepthTrend(1, 1, 0, 0, 1, 1) for name in TRENDED}},
        {"trends": {name: DepthTrend(1, 1, 1, 1e9, 1, 1) for name in TRENDED}},
        {"trends": {name: DepthTrend(float("nan"), 1, 1, 0, 1, 1) for name in TRENDED}},
    ],
)
def test_known_cells_that_cannot_be_are_refused_although_well_signed(
    folder: Path, changes: dict[str, object]
) -> None:
    known = replace(toy_model(HEADS[1]).known, **changes)
    data = tampered(known)
    (folder / KNOWN_FILE).write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    digest = hashlib.sha256(data).hexdigest()
    resign(folder, {**config, "files": {**config["files"], KNOWN_FILE: digest}})
    with pytest.raises(ModelError, match="not a whole model folder"):
        read_model(folder)


def tampered(known: KnownCells) -> bytes:
    """Its file; one without scores is written with a tensor missing."""
    if known.scores:
        return encoded(known)
    whole = encoded(toy_model(HEADS[1]).known)
    return whole.replace(b"calib.energy", b"calib.enerxx")


def test_others_may_read_every_file_as_far_as_the_umask_lets_them(folder: Path) -> None:
    (folder / "plain").write_text("")
    expected = (folder / "plain").stat().st_mode
    assert all(file.stat().st_mode == expected for file in folder.iterdir())


def test_only_the_card_may_be_edited(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine\n")
    read_model(folder)


@pytest.mark.parametrize("content", [None, "[]", "5", "{}", "\xff"])
def test_folders_that_hold_no_model_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin1"))
    with pytest.raises(ModelError, match=r"no model folder here|config\.json"):
        read_model(tmp_path)


def test_a_model_replaces_a_model_or_an_empty_folder_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    before = read_model(folder).digest
    write_model(folder, toy_model(HEADS[2]), "card")
    assert read_model(folder).digest != before
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "empty", toy_model(None), "card")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    for path in (tmp_path / "full", tmp_path / "full/thesis.txt"):
        with pytest.raises(ModelError, match="exists and is not a model folder; choose another"):
            write_model(path, toy_model(None), "card")
    assert (tmp_path / "full/thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "model"]


def test_a_model_that_cannot_be_written_leaves_the_old_one_and_nothing_aside(folder: Path) -> None:
    before = files_of(folder)
    model = toy_model(HEADS[1])
    with pytest.raises(TypeError):
        write_model(folder, replace(model, info=replace(model.info, provenance={"a": object()})), "card")
    assert files_of(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def toy_store(path: Path, counting: str = "insertion", **space: object) -> IslandStore:
    create_store(path, toy_space(**space), counting)
    return IslandStore.open(path)


def test_cells_list_closed_islands_only_where_something_reads_them() -> None:
    assert toy_model(None).attend == "open"
    pretrained = toy_model(None, attend="all")
    assert pretrained.attend == "all"
    assert replace(pretrained, info=replace(pretrained.info, linformer_trained=False)).attend == "open"
    for head, expected in (
        (HeadConfig("cnn"), "all"),
        (HeadConfig(), "all"),
        (HeadConfig(reads="none"), "open"),
    ):
        assert toy_model(head, attend="all").attend == expected


def test_a_store_of_the_models_islands_and_counting_fits(tmp_path: Path) -> None:
    toy_model(None).check_store(toy_store(tmp_path / "s.zarr"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"assembly": "hg38"}, r"(?s)assembly: +store hg38, .*sha256: +store \w+, +model \w+ \(differs\);"),
        ({"width_bp": 1000}, r"width_bp: +store 1000, +model 5000 +\(differs\);"),
        (
            {"counting": "fragment"},
            r"does not fit the model:\n(?s:.*)counting: +store fragment, +model insertion +\(differs\);",
        ),
    ],
)
def test_other_stores_are_refused_by_what_differs(tmp_path: Path, other: dict, message: str) -> None:
    model = toy_model(None)
    with pytest.raises(ModelError, match=message):
        model.check_store(toy_store(tmp_path / "s.zarr", **other))


def test_a_store_of_other_islands_under_the_same_names_is_refused(tmp_path: Path) -> None:
    model = toy_model(None)
    store = toy_store(tmp_path / "s.zarr")
    other = replace(model, info=replace(model.info, space_sha256="0" * 64))
    with pytest.raises(
        ModelError,
        match=r"does not fit the model:\n(?s:.*)sha256: +store \w+, +model 0+ \(differs\);\nconvert",
    ):
        other.check_store(store)
