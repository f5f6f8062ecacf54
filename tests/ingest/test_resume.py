"""Conversions that are killed or interrupted, and go on where they were."""

import gzip
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from compressed_files import bgzf
from killing import convert_and_die, n_changes
from matrix_files import PEAKS, names, some_counts
from stores import FRAGMENTS, digests, write_lines
from told import Said

from annatac_scale.ingest.convert import convert
from annatac_scale.store.info import describe
from annatac_scale.store.store import IslandStore


def write_ranges(folder: Path) -> dict[str, Any]:
    text = write_lines(folder / "s.tsv", FRAGMENTS).read_bytes()
    (folder / "s.tsv.gz").write_bytes(bgzf(text, 500))
    return {"inputs": [folder / "s.tsv.gz"], "range_bytes": 4000, "min_fragments": 5, "workers": 2}


def write_stream(folder: Path) -> dict[str, Any]:
    text = write_lines(folder / "s.tsv", FRAGMENTS * 30).read_bytes()
    (folder / "s.tsv.gz").write_bytes(gzip.compress(text, 1))
    return {"inputs": [folder / "s.tsv.gz"], "min_fragments": 5, "workers": 3}


def write_matrix(folder: Path) -> dict[str, Any]:
    obs = pd.DataFrame(index=[f"c{i}" for i in range(9001)])
    matrix = some_counts(9001, 33, seed=4)
    anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=names(PEAKS))).write_h5ad(folder / "s.h5ad")
    return {"inputs": [folder / "s.h5ad"], "workers": 2}


INPUTS = {"ranges": write_ranges, "stream": write_stream, "matrix": write_matrix}


def counted_already(store: Path, size: int, kind: str) -> int:
    """Bytes of the input whose ranges or shards a stopped run has put down."""
    draft = store / ".incoming" / "s"
    if kind == "ranges":
        return sum(min(4000, size - 4000 * int(path.name)) for path in draft.glob("**/ranges/[0-9]*"))
    if kind == "stream":
        return size if len(list(draft.glob("**/ranges/[0-9]*"))) == 3 else 0
    return sum(
        size * (4000 if int(path.stem) < 2 else 1001) // 9001 for path in draft.glob("shards/[0-9]*.json")
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", INPUTS)
def test_a_conversion_killed_at_any_moment_goes_on(tmp_path: Path, chrom_sizes: Path, kind: str) -> None:
    """Case 11."""
    options = INPUTS[kind](tmp_path)
    size = options["inputs"][0].stat().st_size
    conversion = {"assembly": "toy", "select": "all", "chrom_sizes": chrom_sizes} | options
    whole, store = tmp_path / "whole" / "a.zarr", tmp_path / "killed" / "a.zarr"
    n = n_changes(whole.parent, **conversion, out=whole)
    n_reused = 0
    for change in np.linspace(2, n, 12).astype(int).tolist():
        convert_and_die(store.parent, change, **conversion, out=store)
        there = digests(store) if store.exists() else {}
        assert there in ({}, digests(whole))
        reused = counted_already(store, size, kind)
        if store.exists() and not there:
            assert describe(IslandStore.open(store)).unfinished == ["s"] * (store / ".incoming/s").exists()
        said = Said()
        convert(**conversion, out=store, progress=said)
        assert digests(store) == digests(whole)
        if not there:
            assert said.found == reused
            assert size - 3 < said.found + said.done <= size
            n_reused += bool(reused)
        assert sorted(path.name for path in store.iterdir()) == [".lock", "islands", "samples", "zarr.json"]
        shutil.rmtree(store.parent)
    assert n_reused > 1
