"""`annatac info`: the quality of cells as text, JSON and a picture, and the digest alone."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import done, refusal, run, strict_json

import annatac_scale as ats
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, create_store

SPACE = IslandSpace.all(Assembly("toy", ("chr1",), (300_000,)))
OBS = pd.DataFrame(
    {
        "n_fragments": [10, 400, 90],
        "tss_enrichment": [4.0, np.nan, 8.0],
        "fraction_in_peaks": [0.5, 0.25, 0.125],
    },
    index=["a", "b", "c"],
)
CONVERSION = {
    "kind": "fragments",
    "lines": {"lines": 2000, "comment": 0, "counted": 500, "not_a_cell": 1500},
    "barcode_rank": {"rank": [1, 2, 3, 9], "n_fragments": [400, 90, 10, 1], "n_barcodes": 9, "n_cells": 3},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("info") / "atlas.zarr"
    create_store(path, SPACE, "insertion")
    with SampleWriter(path, "kidney", 3) as writer:
        writer.write_shard(
            0, OpenIslands(np.zeros(4, np.int64), np.empty(0, np.int32), np.empty(0, np.uint8))
        )
        writer.commit(OBS, np.ones(len(SPACE), bool), CONVERSION)
    return path


def test_quality_is_a_line_a_sample(store: Path) -> None:
    result = done("info", store, "--qc")
    assert result.stderr == ""
    head, line = result.stdout.splitlines()[:2]
    assert head.split()[:4] == ["sample", "from", "cells", "fragments"]
    assert line.split() == ["kidney", "fragments", "3", "90", "25.0%", "6", "9", "2,000", "25.0%", "75.0%"]


def test_quality_as_json_says_the_same(store: Path) -> None:
    (sample,) = strict_json(done("info", store, "--qc", "--json").stdout)["samples"]
    assert sample["medians"] == {"n_fragments": 90, "fraction_in_peaks": 0.25, "tss_enrichment": 6}
    assert (sample["n_cells"], sample["n_barcodes"]) == (3, 9)
    assert sample["shares_of_lines"] == {"counted": 0.25, "not_a_cell": 0.75}


def test_a_picture_is_drawn_beside_the_table(store: Path, tmp_path: Path) -> None:
    picture = tmp_path / "quality.png"
    assert done("info", store, "--qc", "--plot", picture).stdout == done("info", store, "--qc").stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_digest_is_printed_alone(store: Path) -> None:
    digest = IslandStore.open(store).digest
    assert done("info", store, "--digest").stdout == f"{digest}\n"
    assert strict_json(done("info", store, "--digest", "--json").stdout) == {"digest": digest}
    assert ats.info(store, digest=True) == digest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "x.png"], "--plot x.png: found without --qc"),
        (["--digest", "--qc"], "found both --digest and --qc"),
        (["--verify", "--qc"], "found both --qc and --verify"),
        (["--workers", 3], "--workers 3: found without --verify"),
        (["--qc", "--plot", "x.jpg"], "x.jpg: found the ending '.jpg'; expected .png, .svg, .pdf"),
    ],
)
def test_what_does_not_fit_together_is_refused(words: list[str], message: str, store: Path) -> None:
    assert refusal("info", store, *words).startswith(message)


def test_a_sound_store_is_verified_with_exit_code_0(store: Path) -> None:
    result = done("info", store, "--verify", "--workers", 2)
    assert result.stdout.splitlines()[0] == str(store)
    assert result.stdout.splitlines()[-1] == "  result    everything is as it should be"
    assert result.stderr == ""
    values = strict_json(done("info", store, "--verify", "--json").stdout)
    assert (values["sound"], values["findings"], values["n_cells"]) == (True, [], 3)
    assert ats.info(store, verify=True).digest == ats.info(store, digest=True)


def test_a_damaged_store_is_told_with_exit_code_1(store: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(store, tmp_path / "atlas.zarr")
    (damaged / "samples/kidney/obs/n_fragments/c.0").write_bytes(b"damaged")
    (damaged / "samples/kidney/uns/zarr.json").unlink()
    result = run("info", damaged, "--verify")
    assert result.exit_code == 1
    wrong = [line for line in result.stdout.splitlines() if line.startswith("  wrong     ")]
    assert len(wrong) == 2
    assert all("found" in line and "expected" in line and "restore" in line for line in wrong)
    assert result.stdout.splitlines()[-1] == "  result    2 findings"
    result = run("info", damaged, "--verify", "--json")
    assert result.exit_code == 1
    findings = strict_json(result.stdout)["findings"]
    assert {finding["place"] for finding in findings} == {
        f"{damaged}/samples/kidney/obs/n_fragments",
        f"{damaged}/samples/kidney/uns/zarr.json",
    }
    assert all(set(finding) == {"place", "found", "expected", "advice"} for finding in findings)


def test_an_ending_is_refused_before_anything_is_read() -> None:
    assert "x.jpg" in refusal("info", "nosuch", "--qc", "--plot", "x.jpg")


def test_cost_is_a_line_a_preset_and_the_same_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("annatac_scale.train.cost.LEAST_S", 0.0)
    monkeypatch.setattr("annatac_scale.train.cost.PRESETS", ("tiny",))
    path = tmp_path / "atlas.zarr"
    create_store(path, SPACE, "insertion")
    cells = OpenIslands(np.arange(4) * 2, np.tile(np.array([3, 7], np.int32), 3), np.ones(6, np.uint8))
    with SampleWriter(path, "kidney", 3) as writer:
        writer.write_shard(0, cells)
        writer.commit(OBS, np.ones(len(SPACE), bool), CONVERSION)
    lines = done("info", path, "--cost").stdout.splitlines()
    assert lines[1].split() == ["cells", "3,", "2.0", "open", "islands", "a", "cell"]
    assert [line.split()[:2] for line in lines if line.startswith("tiny")] == [
        ["tiny", "all"],
        ["tiny", "open"],
    ]
    report = strict_json(done("info", path, "--cost", "--json").stdout)
    assert [one["attend"] for one in report["presets"]] == ["all", "open"]
    assert report["n_islands"] == 2
    assert "found both --qc and --cost" in refusal("info", path, "--cost", "--qc")
