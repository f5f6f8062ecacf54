"""Whatever is damaged, a verification finds it or it changes nothing; memory is bounded whatever the store's size."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_stores import MEASURED, SPACE, barcodes
from verified_stores import measured_cells, write_counted

from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.store.verify import verify
from annatac_scale.store.writer import SampleWriter, create_store


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
