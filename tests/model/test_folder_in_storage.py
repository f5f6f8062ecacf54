"""A model folder in object storage is the one that would lie on a disk; config.json, put last, makes it a model."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killed_writes import CARD, ends_of, new_model
from model_folders import DAMAGES, HEADS, MODEL_FILES, TYPER_FILES, files_of, resigned, toy_batch, toy_model
from object_storage import ObjectStorage

from annatac_scale.errors import InputError, ModelError, StoreError
from annatac_scale.model.cell_typer import HeadConfig
from annatac_scale.model.folder import read_model, write_model
from annatac_scale.store.objects import Prefix

NO_CONFIG = r"no model folder here \(found no config\.json"
NAMES = sorted(TYPER_FILES - {"README.md"})

texts = st.text(st.characters(codec="utf-8"), max_size=8)


@pytest.fixture
def url(s3: ObjectStorage) -> str:
    """Of a fine-tuned model."""
    url = f"{s3.bucket()}/runs/a/model"
    write_model(url, toy_model(HEADS[1]), "# A model\n")
    return url


def objects_of(s3: ObjectStorage, url: str) -> dict[str, bytes]:
    return {key: s3.get(f"{url}/{key}") for key in s3.keys(url)}


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.sampled_from(HEADS),
    norm=st.sampled_from(["pre", "post"]),
    labels=st.lists(texts, min_size=1, max_size=4, unique=True),
    temperature=st.floats(0.1, 10),
    provenance=st.dictionaries(texts, st.integers() | texts, max_size=3),
    card=texts,
)
def test_a_model_in_object_storage_is_the_one_on_disk(
    s3: ObjectStorage,
    tmp_path: Path,
    head: HeadConfig | None,
    norm: str,
    labels: list[str],
    temperature: float,
    provenance: dict[str, Any],
    card: str,
) -> None:
    model = toy_model(head, tuple(labels), norm=norm)
    kept = {"temperature": temperature} if head else {}
    model = replace(model, info=replace(model.info, provenance=provenance, **kept))
    url, path = f"{s3.bucket()}/runs/a/model", tmp_path / "model"
    write_model(url, model, card)
    write_model(path, model, card)
    assert objects_of(s3, url) == files_of(path)
    there, here = read_model(url), read_model(path)
    assert (there.path, here.path) == (url, path)
    assert there.digest == here.digest
    assert there.info == here.info == model.info
    np.testing.assert_array_equal(there.vocabulary.islands, model.vocabulary.islands)
    pd.testing.assert_frame_equal(there.islands, model.islands)
    parts = [m.encoder if head is None else m.typer for m in (there, model)]
    found, expected = (part.state_dict() for part in parts)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    if head is not None:
        np.testing.assert_array_equal(there.typer.predict(toy_batch()), model.typer.predict(toy_batch()))


def test_a_slash_at_the_end_of_the_url_and_a_bucket_of_its_own_do_not_matter(
    s3: ObjectStorage, url: str
) -> None:
    assert read_model(f"{url}/").digest == read_model(url).digest
    bucket = s3.bucket()
    write_model(f"{bucket}/", read_model(url), "# A model\n")
    assert objects_of(s3, bucket) == objects_of(s3, url)
    assert read_model(bucket).digest == read_model(url).digest


def test_each_file_is_asked_for_once_and_nothing_else(s3: ObjectStorage, url: str) -> None:
    before = len(s3.requests)
    read_model(url)
    bucket = url.removeprefix("s3://").partition("/")[0]
    asked = sorted(s3.requests[before:])
    assert asked == sorted(f"GET /{bucket}/runs/a/model/{name}" for name in NAMES)


def test_config_json_is_put_last(s3: ObjectStorage, url: str) -> None:
    for model in (toy_model(HEADS[1]), toy_model(None)):
        before = len(s3.requests)
        write_model(url, model, "# Again\n")
        changes = [line for line in s3.requests[before:] if not line.startswith(("GET ", "HEAD "))]
        assert changes[-1].startswith("PUT ")
        assert changes[-1].endswith("/model/config.json")
        assert sum("config.json" in line for line in changes if line.startswith("PUT ")) == 1


def test_a_folder_without_config_json_is_no_model(s3: ObjectStorage, url: str) -> None:
    Prefix(url).remove("config.json")
    assert set(s3.keys(url)) == TYPER_FILES - {"config.json"}
    for place in (url, url.removesuffix("/model"), f"{url}/config.json"):
        with pytest.raises(ModelError, match=rf"^{place}: {NO_CONFIG}"):
            read_model(place)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_object_is_refused_by_its_url(
    s3: ObjectStorage, url: str, name: str, damage: Callable[[bytes], bytes]
) -> None:
    s3.put(f"{url}/{name}", damage(s3.get(f"{url}/{name}")))
    with pytest.raises(ModelError, match=rf"^{url}/{name}: "):
        read_model(url)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"config.json"}))
def test_a_missing_object_is_refused_by_its_url(url: str, name: str) -> None:
    Prefix(url).remove(name)
    with pytest.raises(ModelError, match=rf"^{url}/{name}: missing"):
        read_model(url)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "s3://other/secret", ""])
def test_names_in_config_json_are_never_asked_for(s3: ObjectStorage, url: str, name: str) -> None:
    config = json.loads(s3.get(f"{url}/config.json"))
    for files in ({**config["files"], name: "0" * 64}, {name: "0" * 64}):
        s3.put(f"{url}/config.json", resigned({**config, "files": files}))
        before = len(s3.requests)
        with pytest.raises(ModelError, match=r"config\.json: cut short or edited"):
            read_model(url)
        assert [line.rpartition("/")[2] for line in s3.requests[before:]] == ["config.json"]


def test_a_model_that_is_replaced_while_it_is_read_is_refused(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Prefix.read

    def read_and_replace(place: Prefix, name: str) -> bytes:
        data = read(place, name)
        if name == "config.json":
            write_model(url, toy_model(HEADS[2]), "# Another\n")
        return data

    monkeypatch.setattr(Prefix, "read", read_and_replace)
    with pytest.raises(ModelError, match=r"weights\.safetensors: missing, cut short or edited"):
        read_model(url)


def test_a_model_replaces_a_model_or_what_a_stopped_writer_left_and_nothing_else(
    s3: ObjectStorage, url: str
) -> None:
    s3.put(f"{url}2/notes.txt", b"beside")
    write_model(url, toy_model(None), "# Pretrained\n")
    assert set(s3.keys(url)) == MODEL_FILES
    Prefix(url).remove("config.json")
    write_model(url, toy_model(HEADS[2]), "# Fine-tuned\n")
    assert set(s3.keys(url)) == TYPER_FILES
    assert read_model(url).info.head == HEADS[2]
    for name in ("thesis.txt", "weights.safetensors/x"):
        other = f"{s3.bucket()}/model"
        s3.put(f"{other}/{name}", b"mine")
        with pytest.raises(ModelError, match=f"^{other}: exists and is not a model folder; choose another"):
            write_model(other, toy_model(None), "card")
        assert objects_of(s3, other) == {name: b"mine"}
    assert objects_of(s3, f"{url}2") == {"notes.txt": b"beside"}


def test_a_model_that_cannot_be_written_leaves_the_old_one(s3: ObjectStorage, url: str) -> None:
    before = objects_of(s3, url)
    model = toy_model(HEADS[1])
    with pytest.raises(TypeError):
        write_model(url, replace(model, info=replace(model.info, provenance={"a": object()})), "card")
    assert objects_of(s3, url) == before


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replacing"])
def test_a_writer_that_is_killed_leaves_no_model_and_the_next_one_a_whole_one(
    s3: ObjectStorage, tmp_path: Path, replaces: bool
) -> None:
    base = s3.bucket()
    n_changes = len(MODEL_FILES) + (len({"config.json", *TYPER_FILES - MODEL_FILES}) if replaces else 0)
    for number in range(n_changes + 1 if replaces else 0):
        write_model(f"{base}/{number}", toy_model(HEADS[1]), "# Old\n")
    assert ends_of(base) == [-signal.SIGKILL] * n_changes + [0]
    write_model(tmp_path / "new", new_model(), CARD)
    for number in range(n_changes):
        url = f"{base}/{number}"
        if replaces and number == 0:
            assert read_model(url).info.head == HEADS[1]  # nothing was changed yet
        else:
            with pytest.raises(ModelError, match=NO_CONFIG):
                read_model(url)
        write_model(url, new_model(), CARD)
    for number in range(n_changes + 1):
        assert objects_of(s3, f"{base}/{number}") == files_of(tmp_path / "new")
        assert read_model(f"{base}/{number}").digest == read_model(tmp_path / "new").digest


def test_urls_of_no_bucket_or_of_something_else_are_refused(s3: ObjectStorage) -> None:
    with pytest.raises(StoreError, match="found no such bucket"):
        read_model("s3://no-such-bucket-here/model")
    with pytest.raises(StoreError, match="no-such-bucket-here"):
        write_model("s3://no-such-bucket-here/model", toy_model(None), "card")
    for url in ("https://host/model", "s3://"):
        with pytest.raises(InputError, match="expected s3://bucket/name"):
            read_model(url)
        with pytest.raises(InputError, match="expected s3://bucket/name"):
            write_model(url, toy_model(None), "card")
