"""A verification finds whatever was changed in a store, says where, and breaks down at nothing."""

import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs.zstd import Zstd
from object_storage import ObjectStorage
from random_stores import MEASURED, SPACE, barcodes, random_cells, random_obs, write_sample
from scipy import sparse

from annatac_scale.errors import StoreError
from annatac_scale.store import obs as obs_module
from annatac_scale.store.codec import encode_block
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Folder
from annatac_scale.store.store import IslandStore
from annatac_scale.store.verify import VerifyReport, verify
from annatac_scale.store.writer import SampleWriter, create_store, replace_obs
from annatac_scale.store.zstd import content_size

N_CELLS = {"kidney": 4300, "lung": 7, "nobody": 0}
SHARD = "samples/kidney/X/c/1/0"
"""Cells 4,000 to 4,299: two blocks."""


def measured_cells(n_cells: int, seed: int, density: float = 0.02) -> sparse.csr_matrix:
    """Random cells without open islands that were not measured."""
    cells = random_cells(n_cells, seed, density).multiply(MEASURED.astype(np.uint8)).tocsr().astype(np.uint8)
    cells.eliminate_zeros()
    return cells


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("verify") / "atlas.zarr"
    create_store(store, SPACE, "insertion")
    for seed, (name, n_cells) in enumerate(N_CELLS.items()):
        write_counted(store, name, measured_cells(n_cells, seed))
    return store


def write_counted(store: Path | str, name: str, cells: sparse.csr_matrix) -> None:
    n_cells, n_open = cells.shape[0], np.diff(cells.indptr)
    conversion = {
        "kind": "fragments",
        "lines": {"lines": 12, "comment": 2, "counted": 7, "not_a_cell": 2, "invalid": 1},
        "invalid": {"too few columns": 1},
        "peaks": {
            "peaks": 9,
            "in_islands": 7,
            "outside_islands": 2,
            "other_contig": 0,
            "measured_islands": int(MEASURED.sum()),
        },
        "cells": {"cells": n_cells, "without_counts": int((n_open == 0).sum())},
        "assembly": "toy",
        "counting": "insertion",
    }
    with SampleWriter(store, name, n_cells) as writer:
        rows = OpenIslands.from_csr(cells)
        for shard in range(-(-n_cells // 4000)):
            writer.write_shard(shard, rows[shard * 4000 : (shard + 1) * 4000])
        writer.commit(random_obs(n_cells, 3).assign(n_open=n_open), MEASURED, conversion)


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


def content(path: Path) -> list[Any]:
    """All that a reader takes from a store."""
    store = IslandStore.open(path)
    cells = store.read(np.arange(store.n_cells))
    obs = store.obs().astype(object)
    return [
        store.space.sha256,
        store.space.names(),
        [(s.name, s.n_cells, s.n_open, s.digest, s.x_sha256, s.measured.tolist()) for s in store.samples.values()],
        [cells.offsets.tolist(), cells.islands.tolist(), cells.levels.tolist()],
        obs.where(obs.notna(), None).to_dict("list"),
    ]  # fmt: skip


@dataclass(frozen=True, repr=False)
class Small:
    """A small store, what it holds, and its files but those that nothing covers."""

    store: Path
    content: list[Any]
    files: list[str]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    store = tmp_path_factory.mktemp("small") / "atlas.zarr"
    create_store(store, SPACE, "insertion")
    write_counted(store, "a", measured_cells(260, 1))
    write_counted(store, "b", measured_cells(3, 2))
    files = sorted(str(file.relative_to(store)) for file in store.rglob("*") if file.is_file())
    return Small(store, content(store), [name for name in files if "genes" not in name])


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 10_000),
        st.sampled_from([*["flip"] * 3, "cut", "append", "delete", "empty", "zero", "double", "copy", "folder"]),
        st.integers(0, 2**32),
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=3,
)  # fmt: skip


def do_damage(store: Path, files: list[str], which: int, how: str, where: int, by: int) -> None:
    file = store / files[which % len(files)]
    if not file.is_file():
        return
    data = bytearray(file.read_bytes())
    at = where % max(1, len(data))
    file.unlink()  # it may be a hard link
    if how == "flip" and data:
        data[at] ^= by
    elif how == "cut":
        data = data[:at]
    elif how == "append":
        data += bytes([by] * (by % 9 + 1))
    elif how == "empty":
        data = bytearray()
    elif how == "zero":
        data[at : at + by] = bytes(len(data[at : at + by]))
    elif how == "double":
        data[at:at] = data[at : at + by]
    elif how == "copy":
        other = store / files[where % len(files)]
        data = bytearray(other.read_bytes()) if other.is_file() else data
        file.with_name("copied").write_bytes(data)
    elif how == "folder":
        file.mkdir()
        return
    if how != "delete":
        file.write_bytes(data)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_whatever_is_changed_is_found_or_changes_nothing(
    changes: list[tuple[int, str, int, int]],
    small: Small,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    store = tmp_path_factory.mktemp("damaged") / "atlas.zarr"
    shutil.copytree(small.store, store, copy_function=os.link)
    try:
        for which, how, where, by in changes:
            do_damage(store, small.files, which, how, where, by)
        report = verify(store, workers=2)
        assert report.is_sound == (not report.findings)
        json.dumps(report.to_dict(), allow_nan=False)
        if report.is_sound:
            assert content(store) == small.content
    finally:
        shutil.rmtree(store)


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


RSS = """
import resource, sys
from annatac_scale.store.verify import verify
verify(sys.argv[1], 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = verify(sys.argv[2], 2)
assert report.is_sound and report.n_cells == int(sys.argv[3])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_follows_the_obs_of_a_sample_and_not_the_cells(tmp_path: Path) -> None:
    """Ten times the cells in the same blocks, at most 300 bytes each for the obs of the largest sample."""
    shard = OpenIslands.from_csr(measured_cells(4000, 1, 0.5))
    rows, n_open = [], int(shard.offsets[-1])
    for n_shards in (2, 20):
        store = tmp_path / f"{n_shards}.zarr"
        create_store(store, SPACE, "insertion")
        with SampleWriter(store, "s", 4000 * n_shards) as writer:
            for number in range(n_shards):
                writer.write_shard(number, shard)
            rows.append(pd.DataFrame({"n_open": np.tile(shard.n_open, n_shards)}, barcodes(4000 * n_shards)))
            writer.commit(rows[-1], MEASURED, {})
    done = subprocess.run(
        [sys.executable, "-c", RSS, str(tmp_path / "2.zarr"), str(tmp_path / "20.zarr"), "80000"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    largest_block = 1004 + 2 * n_open * 250 // 4000
    assert int(done.stdout) < 2 * (12 * largest_block) + (300 + 12) * 80_000
    assert 5 * n_open * 20 > 2 * (300 + 12) * 80_000  # the cells decoded would not fit
