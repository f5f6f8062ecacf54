import json
import shutil
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pandas as pd
import pytest

from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store.info import MAX_DETAILED, StoreInfo, describe
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, create_store, replace_obs

SPACE = IslandSpace.all(Assembly("toy", ("chr1", "chr2"), (300_000, 102_000)))
N_OPEN = {"kidney": [3, 0, 5, 4], "lung_2": [1, 2]}
CONVERSION = {
    "kind": "fragments",
    "inputs": [
        {"role": "data", "path": "/raw/kidney.tsv.gz", "size": 1_234_567, "mtime_ns": 1, "sha256": "0"},
        {"role": "peaks", "path": "/raw/peaks.bed", "size": 999, "mtime_ns": 1, "sha256": "1"},
    ],
    "options": {"min_fragments": 1000},
    "versions": {"annatac_scale": "0.1.0"},
    "finished": "2026-01-02T03:04:05+00:00",
    "peaks": {"peaks": 80, "in_islands": 70, "outside_islands": 10},
    "cells": {"cells": 4, "without_fragments": 1},
    "lines": {"lines": 12345, "comment": 2, "counted": 12343},
    "contigs": {"renamed": {"1": "chr1"}, "other": {f"GL{i}": 7 for i in range(5)}, "n_other": 25},
}
MEASURED = {"kidney": 70, "lung_2": len(SPACE)}


def write_sample(path: Path, name: str, n_open: list[int], conversion: dict[str, Any], measured: int) -> None:
    islands = [np.arange(n, dtype=np.int32) for n in n_open]
    offsets = np.cumsum([0, *n_open])
    cells = OpenIslands(offsets, np.concatenate(islands), np.ones(offsets[-1], np.uint8))
    obs = pd.DataFrame({"n_open": n_open, "cell_type": "B"}, index=[f"c{i}" for i in range(len(n_open))])
    with SampleWriter(path, name, len(n_open)) as writer:
        writer.write_shard(0, cells)
        writer.commit(obs, np.arange(len(SPACE)) < measured, conversion)


@pytest.fixture(scope="module")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("info") / "atlas.zarr"
    create_store(store, SPACE, "insertion")
    write_sample(store, "kidney", N_OPEN["kidney"], CONVERSION, MEASURED["kidney"])
    write_sample(store, "lung_2", N_OPEN["lung_2"], {}, MEASURED["lung_2"])
    return store


@pytest.fixture
def path(_template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(_template, tmp_path / "atlas.zarr")


def info_of(path: Path) -> StoreInfo:
    return describe(IslandStore.open(path))


def files_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_the_numbers_are_those_of_the_cells(path: Path) -> None:
    info = info_of(path)
    assert (info.n_cells, info.n_open) == (6, 15)
    assert [sample.name for sample in info.samples] == list(N_OPEN)
    for sample in info.samples:
        counts, opened = N_OPEN[sample.name], sample.open_per_cell
        assert (sample.n_cells, sample.n_open) == (len(counts), sum(counts))
        assert (opened.mean, opened.median) == (mean(counts), median(counts))
        assert (opened.least, opened.most) == (min(counts), max(counts))
        assert sample.measured_islands == MEASURED[sample.name]
        assert sample.columns == ["n_open", "cell_type"]
        assert sample.digest == IslandStore.open(path).samples[sample.name].digest


def test_the_bytes_are_those_of_the_files(path: Path) -> None:
    info = info_of(path)
    for sample in info.samples:
        assert sample.bytes == files_below(path / "samples" / sample.name)
        assert sample.x_bytes == files_below(path / "samples" / sample.name / "X")
    assert info.bytes == files_below(path / "islands") + sum(sample.bytes for sample in info.samples)
    assert info.x_bytes == sum(sample.x_bytes for sample in info.samples)
    assert info.bytes_per_cell == info.bytes / 6


def test_x_is_not_read(path: Path) -> None:
    before = info_of(path)
    for sample in N_OPEN:
        shutil.rmtree(path / "samples" / sample / "X/c")
    after = info_of(path)
    assert [s.open_per_cell for s in after.samples] == [s.open_per_cell for s in before.samples]


def test_json_holds_all_and_conversions_as_stored(path: Path) -> None:
    info = info_of(path)
    read = json.loads(json.dumps(info.to_dict()))
    assert read == info.to_dict()
    assert [sample["conversion"] for sample in read["samples"]] == [CONVERSION, {}]
    assert (read["assembly"], read["selection"], read["width_bp"]) == ("toy", "all", 5000)
    assert (read["counting"], read["version"], read["n_islands"]) == ("insertion", "2.0", len(SPACE))
    assert read["samples"][0]["open_per_cell"] == {"mean": 3.0, "median": 3.5, "least": 0, "most": 5}


def test_the_text_says_what_where_and_from(path: Path) -> None:
    text = info_of(path).text()
    assert text.startswith(
        f"{path}\n  format        annatac_scale.island_store 2.0\n  digest        {info_of(path).digest}\n"
        "  assembly      toy\n"
    )
    assert "  islands       81 (all, bins of 5,000 bp)\n" in text
    assert "  open islands  15, 2.5 a cell\n" in text
    details = text[text.index("\nkidney\n") :]
    assert (
        "  input      /raw/kidney.tsv.gz (data, 1.2 MB)\n             /raw/peaks.bed (peaks, 999 B)\n"
        in details
    )
    assert "  options    min_fragments = 1000\n" in details
    assert "  peaks      80 peaks, 70 in islands, 10 outside islands\n" in details
    assert "  lines      12,345 lines, 2 comment, 12,343 counted\n" in details
    assert (
        "  contigs    1 as chr1; not in the assembly: GL0 (7 lines), GL1 (7 lines), GL2 (7 lines) and 22 more\n"
        in details
    )
    assert "  converted  2026-01-02T03:04:05+00:00 by annatac_scale 0.1.0\n" in details
    assert "unfinished" not in text
    assert "\x1b" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_the_table_has_one_aligned_line_a_sample(path: Path) -> None:
    lines = info_of(path).text().split("\n\n")[1].splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:8] == ["kidney", "fragments", "4", "3.0", "3.5", "0", "5", "70"]
    assert lines[2].split()[:8] == ["lung_2", "-", "2", "1.5", "1.5", "1", "2", "81"]


def test_without_a_column_n_open_the_mean_alone_is_known(path: Path) -> None:
    replace_obs(path, "kidney", pd.DataFrame(index=[f"c{i}" for i in range(4)]))
    replace_obs(path, "lung_2", pd.DataFrame({"n_open": ["many", "few"]}, index=["c0", "c1"]))
    info = info_of(path)
    assert [s.open_per_cell.mean for s in info.samples] == [3.0, 1.5]
    assert [s.open_per_cell.median for s in info.samples] == [None, None]
    assert "3.0       -      -     -" in info.text()


@pytest.mark.parametrize("conversion", [{"inputs": ["x"], "options": None}, {"inputs": [{"path": "x"}]}])
def test_conversions_of_other_writers_are_shown_as_far_as_known(
    path: Path, conversion: dict[str, Any]
) -> None:
    write_sample(path, "theirs", [1], conversion, 5)
    text = info_of(path).text()
    assert "  input   x" in text[text.index("\ntheirs\n") :]


def test_samples_that_were_not_committed_are_named_as_unfinished(path: Path) -> None:
    shutil.copytree(path / "samples/kidney", path / "samples/renamed")
    with SampleWriter(path, "half", 3):
        info = info_of(path)
    assert info.unfinished == ["half", "renamed"]
    assert [sample.name for sample in info.samples] == list(N_OPEN)
    assert "unfinished    half, renamed: being written, or left" in info.text()


def test_stores_without_cells_have_a_text(tmp_path: Path) -> None:
    create_store(tmp_path / "empty.zarr", SPACE, "fragment")
    info = info_of(tmp_path / "empty.zarr")
    assert (info.samples, info.bytes_per_cell) == ([], None)
    assert "  cells         0\n" in info.text()
    write_sample(tmp_path / "empty.zarr", "none", [1], {}, 1)
    with SampleWriter(tmp_path / "empty.zarr", "zero", 0) as writer:
        writer.commit(pd.DataFrame(index=pd.Index([], dtype=object)), np.zeros(len(SPACE), bool), {})
    zero = info_of(tmp_path / "empty.zarr").samples[1]
    assert zero.open_per_cell.mean is None


def test_many_samples_get_a_line_each_and_no_details(path: Path) -> None:
    index = path / "samples/zarr.json"
    metadata = json.loads(index.read_text())
    entries = metadata["attributes"]["index"]
    for i in range(MAX_DETAILED):
        shutil.copytree(path / "samples/kidney", path / f"samples/k{i}")
        entries.append({**entries[0], "name": f"k{i}"})
    index.write_text(json.dumps(metadata))
    info = info_of(path)
    assert len(info.samples) == MAX_DETAILED + 2
    assert "/raw/kidney.tsv.gz" not in info.text()
    assert info.text().endswith("--json")
