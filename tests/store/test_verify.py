"""A verification finds whatever was changed in a store, says where, and breaks down at nothing."""

import errno
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from numcodecs.zstd import Zstd
from object_storage import ObjectStorage
from random_stores import MEASURED, SPACE, barcodes, write_sample
from scipy import sparse
from verified_stores import measured_cells, write_counted

from annatac_scale.errors import StoreError
from annatac_scale.store import obs as obs_module
from annatac_scale.store.codec import encode_block
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Folder
from annatac_scale.store.store import IslandStore
from annatac_scale.store.verify import VerifyReport, verify
from annatac_scale.store.writer import create_store, replace_obs
from annatac_scale.store.zstd import content_size

N_CELLS = {"kidney": 4300, "lung": 7, "nobody": 0}
SHARD = "samples/kidney/X/c/1/0"
"""Cells 4,000 to 4,299: two blocks."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("verify") / "atlas.zarr"
    create_store(store, SPACE, "insertion")
    for seed, (name, n_cells) in enumerate(N_CELLS.items()):
        write_counted(store, name, measured_cells(n_cells, seed))
    return store


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    """A sound store of three samples; var is no hard link, so that a file may be changed alone."""
    return shutil.copytree(template, tmp_path / "atlas.zarr")


def one(report: VerifyReport) -> str:
    (finding,) = report.findings
    assert not report.is_sound
    assert (finding.place, finding.found, finding.expected, finding.advice).count("") == 0
    return str(finding)


def flip(file: Path, at: int, by: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= by
    file.unlink()
    file.write_bytes(data)


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(file.read_text())
    change(values["attributes"])
    file.write_text(json.dumps(values))


def edit_index(store: Path, **values: Any) -> None:
    edit(store / "samples/zarr.json", lambda attributes: attributes["index"][0].update(values))


def with_crc(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def write_shard(file: Path, frames: list[bytes | None]) -> None:
    """A shard file, every checksum right, of what may be no frames of blocks at all."""
    body, index = b"", b""
    for frame in [*frames, *[None] * (16 - len(frames))]:
        chunk = b"" if frame is None else with_crc(frame)
        index += struct.pack("<2Q", *((len(body), len(chunk)) if chunk else (2**64 - 1, 2**64 - 1)))
        body += chunk
    file.write_bytes(body + with_crc(index))


def frames_of(file: Path) -> list[bytes]:
    data = file.read_bytes()
    pairs = list(struct.iter_unpack("<2Q", data[-260:-4]))
    return [data[start : start + size - 4] for start, size in pairs if size != 2**64 - 1]


def test_a_sound_store_has_no_findings(store: Path) -> None:
    report = verify(store)
    assert (report.findings, report.notes, report.is_sound) == ([], [], True)
    assert (report.n_samples, report.n_cells, report.n_shards) == (3, 4307, 3)
    opened = IslandStore.open(store)
    assert report.n_open == sum(sample.n_open for sample in opened.samples.values())
    assert report.digest == opened.digest
    assert json.loads(json.dumps(report.to_dict()))["sound"] is True
    assert report.text().splitlines()[-1] == "  result    everything is as it should be"


def test_the_number_of_workers_changes_nothing(store: Path) -> None:
    flip(store / SHARD, 3)
    flip(store / "samples/lung/X/c/0/0", 3)
    reports = [verify(store, workers) for workers in (1, 2, 7)]
    assert reports[0] == reports[1] == reports[2]
    assert len(reports[0].findings) == 2


def test_a_store_without_samples_is_sound(path: Path) -> None:
    assert verify(path).is_sound


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nosuch"):
        with pytest.raises(StoreError, match="no island store here"):
            verify(folder)
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(StoreError, match="not an island store"):
        verify(tmp_path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a lost shard": (
        lambda store: (store / SHARD).unlink(),
        r"kidney/X/c/1/0: found no such file; expected one: its cells have [\d,]+ open islands; restore",
    ),
    "a shard too many": (
        lambda store: shutil.copytree(store / "samples/kidney/X/c/1", store / "samples/kidney/X/c/2"),
        "kidney/X/c/2/0: found a file that no cell of the sample needs; expected none; remove it",
    ),
    "a shard cut short": (
        lambda store: (store / SHARD).write_bytes((store / SHARD).read_bytes()[:-1]),
        "c/1/0, shard index: found crc32c",
    ),
    "a shard of a few bytes": (
        lambda store: (store / SHARD).write_bytes(b"few"),
        "c/1/0: found 3 bytes; expected at least 260",
    ),
    "a byte of a block": (
        lambda store: flip(store / SHARD, 77),
        "c/1/0, block 16: found crc32c [0-9a-f]{8}; expected [0-9a-f]{8}, which is recorded",
    ),
    "no zstd frame": (
        lambda store: write_shard(store / SHARD, [b"no frame at all", frames_of(store / SHARD)[1]]),
        "c/1/0, block 16: found what zstd cannot decompress",
    ),
    "a frame that is too large": (
        lambda store: write_shard(
            store / SHARD, [Zstd().encode(bytes(2_000_000)), frames_of(store / SHARD)[1]]
        ),
        r"block 16: found a frame of 2,000,000 bytes; expected at most",
    ),
    "no encoded block": (
        lambda store: write_shard(
            store / SHARD, [frames_of(store / SHARD)[0], Zstd().encode(b"no block" * 300)]
        ),
        "c/1/0, block 17: found what breaks the island codec",
    ),
    "cells after the last": (
        lambda store: write_shard(store / SHARD, [frames_of(store / SHARD)[0]] * 2),
        r"block 17: found [\d,]+ open islands after the sample's last cell; expected none there",
    ),
    "a block after the last": (
        lambda store: write_shard(
            store / SHARD, [*frames_of(store / SHARD), Zstd().encode(encode_block(OpenIslands.empty(), 250))]
        ),
        "block 18: found a block; expected none: it lies beyond the sample's last cell",
    ),
    "another sum in the index": (lambda store: edit_index(store, n_open=3), "shard_open of 2 shards and"),
    "another x_sha256 in the index": (lambda store: edit_index(store, n_cells=-1), "n_cells -1; expected a number"),
    "a sample twice": (
        lambda store: edit(store / "samples/zarr.json", lambda a: a["index"].append(a["index"][1])),
        "samples/zarr.json: found sample 'lung' twice",
    ),
    "a name that is none": (lambda store: edit_index(store, name="../x"), "found name '../x'; expected a name"),
    "another digest": (
        lambda store: edit_index(store, digest="0" * 64),
        "a digest over islands, x_sha256, measured and obs of '[0-9a-f]{64}'; expected '0{64}'",
    ),
    "a sample that is gone": (
        lambda store: edit(store / "samples/kidney/uns/conversion/zarr.json", lambda a: a.update(complete=1)),
        "uns/conversion/zarr.json: found complete 1; expected True",
    ),
    "lines that do not add up": (
        lambda store: edit(
            store / "samples/kidney/uns/conversion/zarr.json",
            lambda a: a["conversion"]["lines"].update(counted=8),
        ),
        "found lines.lines 12; expected 13",
    ),
    "another number of closed cells": (
        lambda store: edit(
            store / "samples/kidney/uns/conversion/zarr.json",
            lambda a: a["conversion"]["cells"].update(without_counts=77),
        ),
        "found cells.without_counts 77; expected [0-9]+, the cells without",
    ),
    "another n_open in the conversion": (
        lambda store: edit(store / "samples/kidney/uns/conversion/zarr.json", lambda a: a.update(n_open=1)),
        "found n_open 1; expected [0-9]{5}",
    ),
    "a column that is gone": (
        lambda store: shutil.rmtree(store / "samples/kidney/obs/score"),
        "obs/score/zarr.json: found no such file",
    ),
    "a column whose values are gone": (
        lambda store: (store / "samples/kidney/obs/score/c.0").unlink(),
        "kidney: found a digest over",
    ),
    "a barcode file that is damaged": (
        lambda store: flip(store / "samples/kidney/obs/barcode/c.0", 20),
        "kidney/obs/barcode|kidney: found a digest",
    ),
    "islands of a sample": (
        lambda store: shutil.copy(
            store / "samples/kidney/var/start/c.0", store / "samples/kidney/var/end/c.0"
        ),
        "samples/kidney/var/end: found other islands; expected those of islands/end",
    ),
    "other types in X": (
        lambda store: (store / "samples/kidney/X/zarr.json").write_text(
            (store / "samples/kidney/X/zarr.json").read_text().replace('"end"', '"start"')
        ),
        "X/zarr.json: found codecs",
    ),
    "the root": (lambda store: edit(store / "zarr.json", lambda a: a.pop("assembly")), "found assembly None"),
    "a version to come": (
        lambda store: edit(store / "zarr.json", lambda a: a.update(version="3.0")),
        "found version '3.0'; expected 2.x; upgrade annatac_scale",
    ),
    "no root at all": (lambda store: (store / "zarr.json").unlink(), "zarr.json: found no such file"),
    "no index": (lambda store: (store / "samples/zarr.json").write_text("{"), "samples/zarr.json: found no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_its_place_told(name: str, store: Path) -> None:
    change, message = DAMAGE[name]
    change(store)
    finding = one(verify(store))
    assert finding.startswith(f"{store}/")
    assert re.search(message, finding), finding


def test_damaged_islands_are_found(store: Path) -> None:
    shutil.copy(store / "islands/start/c.0", store / "islands/end/c.0")
    assert "islands: found no islands" in str(verify(store).findings[0])


def test_all_findings_are_collected(store: Path) -> None:
    flip(store / SHARD, 9)
    (store / "samples/kidney/X/c/0/0").unlink()
    edit(store / "samples/lung/uns/conversion/zarr.json", lambda a: a.update(n_open=1, x_sha256="0"))
    shutil.rmtree(store / "samples/lung/obs/score")
    (store / "samples/lung/X/c/0/more").touch()
    shutil.rmtree(store / "samples/nobody")
    places = [finding.place.removeprefix(f"{store}/samples/") for finding in verify(store).findings]
    conversion = "lung/uns/conversion/zarr.json"
    assert places[:2] == ["kidney/X/c/0/0", "kidney/X/c/1/0, block 16"]
    assert sorted(places[2:6]) == ["lung/X/c/0/more", "lung/obs/score/zarr.json", conversion, conversion]
    assert all(place.startswith("nobody/") for place in places[6:])
    assert len(places) > 6


def test_cells_that_another_sample_has_are_found(store: Path) -> None:
    """A whole shard that is sound, but not this sample's."""
    other = store.parent / "other.zarr"
    create_store(other, SPACE, "insertion")
    write_counted(other, "kidney", measured_cells(4300, 99))
    shutil.copy(other / SHARD, store / SHARD)
    found = [str(finding) for finding in verify(store).findings]
    assert any("found x_sha256" in finding for finding in found)
    assert any("the index's shard_open" in finding for finding in found)
    assert any("obs/n_open, row 40" in finding and "cells differ" in finding for finding in found)


def test_open_islands_that_were_not_measured_are_found(path: Path) -> None:
    cells = measured_cells(300, 1).tolil()
    cells[260, 14] = 3
    assert not MEASURED[14]
    write_sample(path, "s", cells.tocsr())
    finding = one(verify(path))
    assert "block 1, cell 260: found island 14 open, which is not measured (1 such in the block)" in finding


def test_blocks_stored_without_an_open_island_are_noted(path: Path) -> None:
    write_sample(path, "s", sparse.csr_matrix((3, len(SPACE)), dtype=np.uint8))
    shard = path / "samples/s/X/c/0/0"
    shard.parent.mkdir(parents=True)
    write_shard(shard, [Zstd().encode(encode_block(OpenIslands.empty(), 250))])
    report = verify(path)
    assert report.is_sound
    assert report.notes == [f"{shard}, block 0: stored without an open island"]


def test_barcodes_that_come_twice_are_found(store: Path) -> None:
    sample = IslandStore.open(store).samples["lung"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obs_module, "check_obs", lambda *_: None)
        patch.setattr(obs_module, "_check_barcodes", lambda *_: None)
        replace_obs(store, "lung", sample.obs().set_axis([*barcodes(6), "BC00002-1"]))
    assert "lung/obs/barcode, row 6: found barcode 'BC00002-1' again" in one(verify(store))


def test_leftovers_are_notes(store: Path) -> None:
    for name in (".incoming/heart/sample", ".incoming/lung", "samples/liver", "pictures"):
        (store / name).mkdir(parents=True)
    report = verify(store)
    assert report.is_sound
    assert [note.removeprefix(f"{store}/").split(":")[0] for note in report.notes] == [
        ".incoming/heart",
        ".incoming/lung",
        "samples/liver",
        "pictures",
    ]


def test_a_replacement_of_obs_that_was_stopped_is_settled_first(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = IslandStore.open(store).samples["lung"].obs().assign(donor="D1")
    with monkeypatch.context() as patch:
        patch.setattr(obs_module, "change_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            replace_obs(store, "lung", changed)
    assert verify(store).is_sound
    assert "donor" in IslandStore.open(store).samples["lung"].obs()


def test_what_may_not_be_looked_at_is_a_finding(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Folder.size

    def denied(folder: Folder, name: str) -> int | None:
        if name.endswith(("c/1/0", "score/codes/zarr.json")):
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return size(folder, name)

    monkeypatch.setattr(Folder, "size", denied)
    monkeypatch.setattr(Folder, "folders", denied_folders)
    places = [finding.place.removeprefix(f"{store}/") for finding in verify(store).findings]
    scores = [f"samples/{name}/obs/score" for name in N_CELLS]
    assert places == [".incoming", str(store), scores[0], SHARD, *scores[1:]]


def denied_folders(folder: Folder, name: str = "") -> list[str]:
    raise PermissionError(errno.EACCES, "Permission denied", name)


def test_a_store_in_object_storage_is_verified(s3: ObjectStorage) -> None:
    url = f"{s3.bucket()}/some/atlas.zarr"
    create_store(url, SPACE, "insertion")
    write_counted(url, "kidney", measured_cells(300, 1))
    report = verify(url)
    assert (report.findings, report.notes, report.n_cells) == ([], [], 300)
    data = bytearray(s3.get(f"{url}/samples/kidney/X/c/0/0"))
    data[5] ^= 1
    s3.put(f"{url}/samples/kidney/X/c/0/0", bytes(data))
    finding = one(verify(url))
    assert finding.startswith(f"{url}/samples/kidney/X/c/0/0, block 0: found crc32c")
    with pytest.raises(StoreError, match="no island store here"):
        verify(f"{url}/nothing")


@pytest.mark.parametrize("n", [0, 1, 255, 256, 65_535, 65_791, 65_792, 10**6])
def test_the_size_that_a_frame_tells_is_read(n: int) -> None:
    assert content_size(bytes(Zstd().encode(bytes(n)))) == n
    assert content_size(b"no frame at all") is None
    assert content_size(b"") is None
